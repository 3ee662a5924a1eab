"""CLIP's loss against numpy, on a mesh and with padding; short trainings; the job of a configuration."""

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

from dalle_jax.data.text import TextModel
from dalle_jax.distributed import sharding
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import to_mesh
from dalle_jax.distributed.sharding import batch_sharding, replicated, shardings_of
from dalle_jax.errors import ConfigError
from dalle_jax.metrics.retrieval import retrieval
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.tasks.clip import CLIPTask, _features, contrastive_loss, with_end
from dalle_jax.tasks.corrupted_negatives import NegativeOptions, spoil
from dalle_jax.tasks.registry import abstract, build
from dalle_jax.token_layout import PaddedIds

OPTIONS = CLIPOptions(
    image_size=16, patch=8, image_width=32, image_depth=1, image_heads=2,
    text_width=32, text_depth=1, text_heads=2, embed_dim=16, text_length=6, text_vocab=20, end_id=19,
)  # fmt: skip
NEGATIVES = NegativeOptions(spoiled=2, grid=2, squares=2)
CAPTIONS = PaddedIds(19, 5)


@pytest.fixture(scope="module")
def task():
    return CLIPTask(CLIP(OPTIONS), text_model=None)


@pytest.fixture(scope="module")
def spoiling():
    """The same task with two corrupted copies of each image."""
    return CLIPTask(CLIP(OPTIONS), None, NEGATIVES)


@pytest.fixture(scope="module")
def params(task):
    return nn.meta.unbox(jax.jit(task.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def loss_and_grads(task):
    """A function of parameters and batch that returns ((loss, scalars), gradients), compiled once per batch size."""
    key = jax.random.key(0)
    return jax.jit(jax.value_and_grad(lambda p, b: task.loss(p, {}, b, key, jnp.int32(0)), has_aux=True))


def batch(rows, seed=0):
    rng = np.random.default_rng(seed)
    text = np.stack([CAPTIONS.pad(rng.integers(0, 19, 1 + i % 5)) for i in range(rows)])
    images = rng.integers(0, 256, (rows, 2, 2, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    return {"image": images, "text": text, "valid": np.ones(rows, bool)}


def batches(made, rows=8):
    """Splits a batch into batches of `rows`; the last one is padded with invalid rows."""
    places = np.arange(-(-len(made["text"]) // rows) * rows)
    filled = {name: value[places % len(value)] for name, value in made.items()}
    filled["valid"] = places < len(made["text"])
    return [{name: value[i : i + rows] for name, value in filled.items()} for i in range(0, len(places), rows)]


def vectors(task, params, made):
    """Encodes a batch in parts of eight rows: vectors of images and of captions."""
    parts = [jax.device_get(_features(task.clip, params, part)) for part in batches(made)]
    return [np.concatenate(column)[: len(made["text"])] for column in list(zip(*parts))[:2]]


def unit(rows, seed):
    x = np.random.default_rng(seed).normal(size=(rows, 8))
    return np.float32(x / np.linalg.norm(x, axis=1, keepdims=True))


def by_definition(images, captions, scale, text, spoiled=None):
    """Computes the loss and both accuracies, pair by pair.

    Equal captions are not negatives for each other. `spoiled` lists the corrupted images of each caption.
    """
    nats = to_text = to_image = 0.0
    for i, ids in enumerate(text):
        others = [j for j in range(len(text)) if j == i or (text[j] != ids).any()]
        row = np.array([scale * images[i] @ captions[j] for j in others], np.float64)
        column = np.array([scale * images[j] @ captions[i] for j in others], np.float64)
        own = others.index(i)
        wrong = np.array([scale * x @ captions[i] for x in spoiled[i]] if spoiled else [], np.float64)
        nats += np.log(np.exp(row).sum()) - row[own]
        nats += np.log(np.exp(column).sum() + np.exp(wrong).sum()) - column[own]
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


def test_corrupted_images_against_the_formula():
    images, captions, scale = unit(7, 0), unit(7, 1), 12.5
    text = np.array([0, 0, 2, 3, 0, 5, 6])[:, None]
    vectors, counts = unit(21, 2).reshape(7, 3, 8), np.random.default_rng(3).random((7, 3)) < 0.6
    counts[2] = False
    loss, scalars = jax.jit(contrastive_loss)(images, captions, jnp.float32(scale), text, (vectors, counts))
    wrong = [list(vectors[i][counts[i]]) for i in range(7)]
    nats, to_text, to_image = by_definition(images, captions, scale, text, wrong)
    np.testing.assert_allclose(loss, nats, rtol=1e-5)
    np.testing.assert_allclose(scalars["image_to_text_accuracy"], to_text, rtol=1e-6)
    np.testing.assert_allclose(scalars["text_to_image_accuracy"], to_image, rtol=1e-6)
    won = [images[i] @ captions[i] > x @ captions[i] for i in range(7) for x in wrong[i]]
    assert 0 < np.mean(won) < 1
    np.testing.assert_allclose(scalars["spoiled_accuracy"], np.mean(won), rtol=1e-6)


def test_corrupted_images_that_do_not_count_change_nothing():
    images, captions, vectors = unit(7, 0), unit(7, 1), unit(14, 2).reshape(7, 2, 8)
    none = np.zeros((7, 2), bool)
    scored = jax.jit(jax.value_and_grad(lambda x, y: contrastive_loss(x, captions, jnp.float32(9), None, y)[0], (0,)))
    with_none = jax.jit(
        jax.value_and_grad(lambda x, v: contrastive_loss(x, captions, jnp.float32(9), None, (v, none))[0], (0, 1))
    )
    loss, (grads,) = scored(images, None)
    same, (same_grads, of_wrong) = with_none(images, vectors)
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    np.testing.assert_allclose(same_grads, grads, atol=1e-7)
    np.testing.assert_array_equal(of_wrong, 0)


def test_the_tasks_loss_with_corrupted_images_is_that_of_its_vectors(spoiling, params):
    made, key = batch(16), jax.random.key(5)
    loss, scalars = jax.jit(lambda p: spoiling.loss(p, {}, made, key, jnp.int32(0)))(params)
    wrong, counts = spoil(made["image"], key, NEGATIVES)
    images, captions = vectors(spoiling, params, made)
    flat = vectors(spoiling, params, {name: np.repeat(x, 2, 0) for name, x in made.items()} | {
        "image": np.asarray(wrong).reshape(-1, 16, 16, 3)})[0].reshape(16, 2, -1)  # fmt: skip
    chosen = [list(flat[i][counts[i]]) for i in range(16)]
    nats = by_definition(images, captions, 1 / 0.07, made["text"], chosen)[0]
    assert nats > 1.01 * by_definition(images, captions, 1 / 0.07, made["text"])[0]
    np.testing.assert_allclose(loss, nats, rtol=1e-5)
    assert 0 < scalars["spoiled_accuracy"] < 1


def test_corrupted_images_on_a_mesh_equal_those_of_one_device(spoiling, params):
    made, key = batch(16), jax.random.key(5)
    scored = jax.jit(jax.value_and_grad(lambda p, b: spoiling.loss(p, {}, b, key, jnp.int32(0)), has_aux=True))
    (expected, scalars), expected_grads = scored(params, made)
    mesh = make_mesh(2, 2, 2)
    with sharding.on_mesh(mesh):
        layout = shardings_of(jax.eval_shape(spoiling.init, jax.random.key(0)), mesh)
        sharded = jax.device_put(params, layout), to_mesh(made, batch_sharding(mesh))
        (loss, on_mesh), grads = scored(*sharded)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name in scalars:
        np.testing.assert_allclose(on_mesh[name], scalars[name], rtol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(grads), jax.tree.leaves(expected_grads)):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_the_tasks_loss_is_that_of_its_vectors(task, params, loss_and_grads):
    """All 16 rows of the batch are compared. Captions are read at their end token."""
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
def test_the_loss_and_its_gradients_on_a_mesh_equal_those_of_one_device(task, params, loss_and_grads, axes):
    """Rows are compared across all devices."""
    made = batch(16)
    (expected, scalars), expected_grads = loss_and_grads(params, made)
    mesh = make_mesh(*axes)
    with sharding.on_mesh(mesh):
        layout = shardings_of(jax.eval_shape(task.init, jax.random.key(0)), mesh)
        sharded = jax.device_put(params, layout), to_mesh(made, batch_sharding(mesh))
        (loss, on_mesh), mesh_grads = loss_and_grads(*sharded)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for name in scalars:
        np.testing.assert_allclose(on_mesh[name], scalars[name], rtol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(mesh_grads), jax.tree.leaves(expected_grads)):
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_every_parameter_is_trained(params, loss_and_grads):
    for path, leaf in jax.tree.leaves_with_path(loss_and_grads(params, batch(16))[1]):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_excludes_padding_and_does_not_depend_on_the_batch_size(task, params):
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
    with sharding.on_mesh(mesh := make_mesh()):
        sharded = to_mesh(made, batch_sharding(mesh))
        measured = task.evaluate(jax.device_put(params, replicated(mesh)), {}, [sharded], jax.random.key(0))
    for name, value in task.evaluate(params, {}, [made], jax.random.key(0)).items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-4, err_msg=name)


# -- learning -----------------------------------------------------------------------------------------------------


def test_a_short_training_separates_a_batch(task, params, loss_and_grads):
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


def test_training_with_corrupted_images_teaches_to_see_damage(task, spoiling, params):
    """The additional loss of newly corrupted images, in nats, is lower than after training without them."""
    made, optimizer, costs = batch(16), optax.adam(1e-3), {}
    loss_of = lambda trained_by, params, key: trained_by.loss(params, {}, made, key, jnp.int32(0))[0]
    cost = jax.jit(lambda p, key: loss_of(spoiling, p, key) - loss_of(task, p, key))
    for name, trained_by in (("plain", task), ("spoiling", spoiling)):

        @jax.jit
        def step(params, state, key, trained_by=trained_by):
            updates, state = optimizer.update(jax.grad(lambda p: loss_of(trained_by, p, key))(params), state)
            return optax.apply_updates(params, updates), state

        trained, state = params, optimizer.init(params)
        for i in range(60):
            trained, state = step(trained, state, jax.random.key(i))
        costs[name] = float(np.mean([cost(trained, jax.random.key(1000 + i)) for i in range(8)]))
    assert costs["spoiling"] < 0.75 * costs["plain"], costs


# -- from a configuration -----------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    for i in range(5):
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"an image of the colour number {i}")
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
    job = build(config, str(tmp_path / "run"))
    text_model = TextModel.load(tmp_path / "run" / "text" / "sentencepiece.model")
    options = job.task.clip.options
    assert options.end_id == text_model.vocab_size == options.text_vocab - 1 and options.text_length == 13
    assert job.data_counts() == {"captions_truncated": 0}
    training = next(job.train_batches())
    assert training["image"].shape == (4, 16, 16, 3) and training["text"].shape == (4, 12)
    shapes = nn.meta.unbox(jax.eval_shape(job.task.init, jax.random.key(0)))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32), shapes)
    measured = job.task.evaluate(params, {}, job.eval_batches(), jax.random.key(0))
    assert measured["among"] == 5 and np.isfinite(measured["loss"])
    image = job.task.preview(params, {}, next(iter(job.eval_batches())), jax.random.key(0))
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[1] > 5 * 128


def test_accumulated_gradients_are_rejected(config, tmp_path):
    config.optimizer.accumulate_steps = 2
    with pytest.raises(ConfigError, match="accumulate_steps"):
        build(config, str(tmp_path / "run"))


def test_corrupted_images_of_a_configuration(config, tmp_path):
    config.negatives = {"spoiled": 1, "grid": 4}
    task = build(config, str(tmp_path / "run")).task
    scalars = jax.eval_shape(lambda p, b: task.loss(p, {}, b, jax.random.key(0), 0)[1], *shapes_of(task, config))
    assert "spoiled_accuracy" in scalars
    config.negatives.grid = 5
    with pytest.raises(ConfigError, match="grid"):
        build(config, str(tmp_path / "run"))
    config.negatives = {"spoilt": 1}
    with pytest.raises(ConfigError, match="spoilt"):
        build(config, str(tmp_path / "run"))


def shapes_of(task, config):
    _, made = abstract(config)
    return nn.meta.unbox(jax.eval_shape(task.init, jax.random.key(0))), made


def test_a_caption_of_full_length_has_an_end_token():
    text = np.stack([CAPTIONS.pad([1, 2, 3, 4, 5]), CAPTIONS.pad([7]), CAPTIONS.empty()])
    expected = [[1, 2, 3, 4, 5, 19], [7, 19, 19, 19, 19, 19], [19] * 6]
    np.testing.assert_array_equal(with_end(jnp.asarray(text), OPTIONS.end_id), expected)
