"""CLIP's loss against plain numpy, on a mesh, over padding, and learning; the job of a configuration."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dalle_jax import parallel, tasks
from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError
from dalle_jax.layout import TokenLayout
from dalle_jax.metrics.retrieval import retrieval
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.tasks.clip import CLIPTask, contrastive_loss

OPTIONS = CLIPOptions(
    image_size=16, patch=8, image_width=32, image_depth=1, image_heads=2,
    text_width=32, text_depth=1, text_heads=2, embed_dim=16, text_length=6, text_vocab=20, end_id=19,
)  # fmt: skip
LAYOUT = TokenLayout(19, 1, 5, 1, 1)


@pytest.fixture(scope="module")
def task():
    return CLIPTask(CLIP(OPTIONS), text_model=None)


@pytest.fixture(scope="module")
def params(task):
    return nn.meta.unbox(jax.jit(task.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def loss_and_grads(task):
    """Of parameters and a batch, ((loss, scalars), gradients): compiled once for all tests of one size."""
    key = jax.random.key(0)
    return jax.jit(jax.value_and_grad(lambda p, b: task.loss(p, {}, b, key, jnp.int32(0)), has_aux=True))


def batch(rows, seed=0):
    rng = np.random.default_rng(seed)
    text = np.stack([LAYOUT.pad_text(rng.integers(0, 19, 1 + i % 5)) for i in range(rows)])
    images = rng.integers(0, 256, (rows, 2, 2, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    return {"image": images, "text": text, "valid": np.ones(rows, bool)}


def batches(made, rows=8):
    """The examples of a batch as batches of `rows`, the last one filled up with rows that do not count."""
    places = np.arange(-(-len(made["text"]) // rows) * rows)
    filled = {name: value[places % len(value)] for name, value in made.items()}
    filled["valid"] = places < len(made["text"])
    return [{name: value[i : i + rows] for name, value in filled.items()} for i in range(0, len(places), rows)]


def vectors(task, params, made):
    """Of a batch, picture after picture the same `rows` at once as everywhere here."""
    parts = [jax.device_get(task._features(params, part)) for part in batches(made)]
    return [np.concatenate(column)[: len(made["text"])] for column in list(zip(*parts))[:2]]


def unit(rows, seed):
    x = np.random.default_rng(seed).normal(size=(rows, 8))
    return np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))


def by_definition(images, captions, scale, text):
    """The loss, and how often each side finds its partner, pair by pair; equal captions are no alternatives."""
    nats = to_text = to_image = 0.0
    for i, ids in enumerate(text):
        others = [j for j in range(len(text)) if j == i or (text[j] != ids).any()]
        row = np.array([scale * images[i] @ captions[j] for j in others], np.float64)
        column = np.array([scale * images[j] @ captions[i] for j in others], np.float64)
        own = others.index(i)
        nats += np.log(np.exp(row).sum()) - row[own] + np.log(np.exp(column).sum()) - column[own]
        to_text, to_image = to_text + (row.argmax() == own), to_image + (column.argmax() == own)
    return nats / (2 * len(text)), to_text / len(text), to_image / len(text)


# -- loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, np.array([0, 0, 2, 3, 0, 5, 6])[:, None]], ids=["all differ", "some equal"])
def test_contrastive_loss_against_the_formula(text):
    images, captions, scale = unit(7, 0), unit(7, 1), 12.5
    loss, scalars = jax.jit(contrastive_loss)(images, captions, jnp.float32(scale), text)
    nats, to_text, to_image = by_definition(images, captions, scale, np.arange(7)[:, None] if text is None else text)
    assert to_text != to_image
    np.testing.assert_allclose(loss, nats, rtol=1e-5)
    np.testing.assert_allclose(scalars["image_to_text_accuracy"], to_text, rtol=1e-6)
    np.testing.assert_allclose(scalars["text_to_image_accuracy"], to_image, rtol=1e-6)


def test_the_tasks_loss_is_that_of_its_vectors(task, params, loss_and_grads):
    """And no slice of the batch: all 16 rows are compared. Captions are read at the end token behind them."""
    made = batch(16)
    (loss, scalars), _ = loss_and_grads(params, made)
    images, captions = vectors(task, params, made)
    assert len(np.unique(made["text"], axis=0)) < 16, "no two captions are equal"
    np.testing.assert_allclose(loss, by_definition(images, captions, 1 / 0.07, made["text"])[0], rtol=1e-5)
    np.testing.assert_allclose(scalars["logit_scale"], 1 / 0.07, rtol=1e-5)
    ends = np.full((8, 6), 19, np.int32)
    for row, ids in zip(ends, made["text"]):
        kept = [i for i in ids if i < 19]
        row[: len(kept)] = kept
    np.testing.assert_allclose(captions[:8], jax.jit(task.clip.encode_text)(params, ends), atol=1e-6)


@pytest.mark.parametrize("axes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 2, 2)])
def test_the_loss_and_its_gradients_are_those_of_one_device(task, params, loss_and_grads, axes):
    """The rows of a batch are compared across all devices."""
    made = batch(16)
    (expected, scalars), expected_grads = loss_and_grads(params, made)
    mesh = parallel.make_mesh(*axes)
    with parallel.on_mesh(mesh):
        layout = parallel.shardings_of(jax.eval_shape(task.init, jax.random.key(0)), mesh)
        sharded = jax.device_put(params, layout), parallel.to_mesh(made, parallel.batch_sharding(mesh))
        (loss, on_mesh), mesh_grads = loss_and_grads(*sharded)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name in scalars:
        np.testing.assert_allclose(on_mesh[name], scalars[name], rtol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(mesh_grads), jax.tree.leaves(expected_grads)):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_every_parameter_is_trained(params, loss_and_grads):
    for path, leaf in jax.tree.leaves_with_path(loss_and_grads(params, batch(16))[1]):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


# -- measures -----------------------------------------------------------------------------------------------------


def test_evaluation_leaves_padding_out_and_does_not_depend_on_the_batch_size(task, params):
    made = batch(14)
    one = task.evaluate(params, {}, batches(made, 16), jax.random.key(0))
    split = task.evaluate(params, {}, batches(made, 8), jax.random.key(1))
    assert one.keys() == split.keys() and task.best_metric in one and one["among"] == 14
    for name in one:
        np.testing.assert_allclose(one[name], split[name], rtol=1e-5, err_msg=name)
    images, captions = vectors(task, params, made)
    loss = by_definition(images, captions, 1 / 0.07, made["text"])[0]
    for name, value in {"loss": loss, **retrieval(images, captions, made["text"])}.items():
        np.testing.assert_allclose(one[name], value, rtol=1e-5, err_msg=name)


def test_evaluation_compares_groups_of_64(task, params):
    made = batch(130)
    measured = task.evaluate(params, {}, batches(made), jax.random.key(0))
    images, captions = vectors(task, params, made)
    groups = [slice(i, i + 64) for i in (0, 64)]
    losses = [by_definition(images[rows], captions[rows], 1 / 0.07, made["text"][rows])[0] for rows in groups]
    np.testing.assert_allclose(measured["loss"], np.mean(losses), rtol=1e-5)
    assert measured["among"] == 64


def test_evaluation_on_a_mesh(task, params):
    made = batch(16)
    with parallel.on_mesh(mesh := parallel.make_mesh()):
        sharded = parallel.to_mesh(made, parallel.batch_sharding(mesh))
        measured = task.evaluate(jax.device_put(params, parallel.replicated(mesh)), {}, [sharded], jax.random.key(0))
    for name, value in task.evaluate(params, {}, [made], jax.random.key(0)).items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-4, err_msg=name)


# -- learning -----------------------------------------------------------------------------------------------------


def test_a_short_training_tells_a_batch_apart(task, params, loss_and_grads):
    made, optimizer = batch(16), optax.adam(1e-3)
    update = jax.jit(optimizer.update)
    trained, state, losses = params, optimizer.init(params), []
    for _ in range(60):
        (loss, _), grads = loss_and_grads(trained, made)
        updates, state = update(grads, state)
        trained = jax.tree.map(np.add, trained, jax.device_get(updates))
        losses.append(float(loss))
    assert losses[0] > 0.5 * math.log(16) and losses[-1] < 0.2 * losses[0]
    assert task.evaluate(trained, {}, batches(made), jax.random.key(0))["retrieval@1"] == 1.0


# -- from a configuration -----------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    for i in range(5):
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a picture of the colour number {i}")
    sizes = dataclasses.asdict(OPTIONS)
    for derived in ("image_size", "text_length", "text_vocab", "end_id", "dtype"):
        del sizes[derived]
    return ConfigDict(
        {
            "task": "clip",
            "seed": 0,
            "data": {"source": "folder", "path": str(tmp_path), "image_size": 16, "eval_split": "all"},
            "text": {"vocab_size": 40, "length": 12, "path": None},
            "model": sizes,
            "optimizer": {"accumulate_steps": 1},
            "batch_size": 4,
        }
    )


def test_the_job_of_a_configuration(config, tmp_path):
    job = tasks.build(config, str(tmp_path / "run"))
    text_model = TextModel.load(tmp_path / "run" / "text" / "sentencepiece.model")
    options = job.task.clip.options
    assert options.end_id == text_model.vocab_size == options.text_vocab - 1 and options.text_length == 13
    training = next(job.train_batches())
    assert training["image"].shape == (4, 16, 16, 3) and training["text"].shape == (4, 12)
    shapes = nn.meta.unbox(jax.eval_shape(job.task.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes)
    measured = job.task.evaluate(params, {}, job.eval_batches(), jax.random.key(0))
    assert measured["among"] == 5 and np.isfinite(measured["loss"])
    picture = job.task.preview(params, {}, next(iter(job.eval_batches())), jax.random.key(0))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[1] > 5 * 128


def test_accumulated_gradients_are_refused(config, tmp_path):
    config.optimizer.accumulate_steps = 2
    with pytest.raises(
        ConfigError, match="accumulate_steps=2: the contrastive loss compares all rows of a batch.*Set it"
    ):
        tasks.build(config, str(tmp_path / "run"))


def test_a_caption_of_full_length_is_ended_too():
    task = CLIPTask(CLIP(OPTIONS), text_model=None)
    text = np.stack([LAYOUT.pad_text([1, 2, 3, 4, 5]), LAYOUT.pad_text([7]), LAYOUT.null_text()])
    expected = [[1, 2, 3, 4, 5, 19], [7, 19, 19, 19, 19, 19], [19] * 6]
    np.testing.assert_array_equal(task.with_end(jnp.asarray(text)), expected)
