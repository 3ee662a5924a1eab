"""BEiT's task: targets by the tokenizer at half size, a loss on masked patches alone, and learning on a few images."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.data.labels import Labels
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import on_mesh
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.models.beit import BEiT, BEiTOptions
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.optim import schedules
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions, make_optimizer
from dalle_jax.tasks import beit as tasks
from dalle_jax.tasks.beit import BEiTTask
from dalle_jax.tasks.beit_labels import LabelTask
from dalle_jax.training.step import make_init, make_train_step

SIZE, PATCH, ROWS = 16, 4, 16
TRUNK = TransformerOptions(width=32, depth=2, heads=2, dtype="float32", positions="relative", scan=False)
OPTIONS = BEiTOptions(TRUNK, patch=PATCH, smallest_block=2, masked_share=0.4)
# 8 pixels as 4x4 tokens of 2 pixels: half the size of the images, with as many tokens as patches.
TOKENIZER = DVAETokenizer(
    DVAEOptions(image_size=8, vocab_size=16, hidden=8, groups=1, blocks_per_group=1, codebook_dim=8, stem_factor=2)
)


def images(rows=ROWS, seed=0):
    """Images of flat quarters, which a visible patch predicts, uint8 [rows, 16, 16, 3]."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rows, 2, 2, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)


def tokenizer_params():
    params = nn.meta.unbox(jax.jit(TOKENIZER.init)(jax.random.key(3)))
    return jax.tree.map(lambda x: 8 * x, params)


def make_task(target="tokens", **options):
    options = dataclasses.replace(OPTIONS, target=target, **options)
    if target == "tokens":
        return BEiTTask(BEiT(options, SIZE, TOKENIZER.vocab_size), TOKENIZER, tokenizer_params())
    return BEiTTask(BEiT(options, SIZE, 3 * PATCH**2))


def batch(rows=ROWS, valid=ROWS, seed=0):
    return {"image": images(rows, seed), "valid": np.arange(rows) < valid}


def trained(task, steps, batch, mesh=(1, 1, 1)):
    """Losses of a short training, and the final parameters."""
    mesh = make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
    options = OptimizerOptions(b2=0.98, clip_norm=1.0)
    average, optimizer = AverageOptions(), make_optimizer(options)
    init, abstract = make_init(task, optimizer, average, mesh, 0)
    step = make_train_step(task, optimizer, options, average, {"learning_rate": schedules.Constant(3e-3)}, abstract)
    losses = []
    with on_mesh(mesh):
        state = init()
        for _ in range(steps):
            state, scalars = step(state, task.frozen, batch, jax.random.key(0))
            losses.append(float(scalars["loss"]))
        metrics = task.evaluate(state.params, task.frozen, [batch], jax.random.key(1))
    return losses, metrics, jax.device_get(state.params)


def test_targets_are_the_tokens_of_the_half_sized_image():
    """Each quarter of an image is flat, so that its half-sized copy is exact."""
    given, params = images(), tokenizer_params()
    half = given[:, ::2, ::2]
    expected = jax.jit(TOKENIZER.encode)(params, half).reshape(ROWS, -1)
    found = jax.jit(tasks.target_tokens, static_argnums=(0, 3))(TOKENIZER, params, given, SIZE // PATCH)
    interior = np.ones((4, 4), bool)  # antialiasing mixes nothing inside of a quarter
    assert found.shape == (ROWS, 16) and np.mean(np.asarray(found)[:, interior.ravel()] == expected) > 0.7
    np.testing.assert_array_equal(
        jax.jit(tasks.target_tokens, static_argnums=(0, 3))(TOKENIZER, params, half, 4), expected
    )


@pytest.mark.parametrize("target", ["tokens", "pixels", "normalized_pixels"])
def test_the_loss_is_that_of_the_masked_patches(target):
    task = make_task(target)
    beit, params = task.beit, nn.meta.unbox(jax.jit(task.init)(jax.random.key(0)))
    key, given = jax.random.key(5), images()
    masked = np.asarray(tasks._draw(beit, key, ROWS))
    outputs = np.asarray(jax.jit(beit)(params, given, masked), np.float64)
    if target == "tokens":
        tokens = np.asarray(tasks.target_tokens(TOKENIZER, task.frozen["tokenizer"], given, 4))
        odds = outputs - outputs.max(-1, keepdims=True)
        errors = np.log(np.exp(odds).sum(-1)) - np.take_along_axis(odds, tokens[..., None], -1)[..., 0]
    else:
        pixels = given.reshape(ROWS, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(ROWS, 16, -1) / 127.5 - 1
        if target == "pixels":
            errors = np.abs(outputs - pixels).mean(-1)
        else:
            centred = pixels - pixels.mean(-1, keepdims=True)
            errors = ((outputs - centred / np.sqrt(pixels.var(-1, keepdims=True) + 1e-6)) ** 2).mean(-1)
    metrics = tasks._measure(beit, TOKENIZER if target == "tokens" else None, params, task.frozen, batch(), key)
    assert masked.sum(1).tolist() == [6] * ROWS
    assert float(metrics["loss"]) / ROWS == pytest.approx(errors[masked].mean(), rel=2e-3)


@pytest.mark.parametrize("target, falls_to", [("tokens", 0.6), ("pixels", 0.75)])
def test_it_learns_to_fill_in_patches(target, falls_to):
    losses, metrics, _ = trained(make_task(target), 150, batch())
    assert np.mean(losses[-5:]) < falls_to * losses[0] and metrics["loss"] < falls_to * losses[0]
    if target == "tokens":
        assert metrics["token_accuracy"] > 0.3


def test_eight_devices_train_as_one():
    one, many = (trained(make_task(), 2, batch(), mesh)[0] for mesh in ((1, 1, 1), (2, 2, 2)))
    np.testing.assert_allclose(one, many, rtol=1e-4)


def test_invalid_rows_do_not_count():
    task = make_task("pixels")
    params = nn.meta.unbox(jax.jit(task.init)(jax.random.key(0)))
    given = batch(valid=8)
    changed = {**given, "image": np.where((given["valid"])[:, None, None, None], given["image"], 0).astype(np.uint8)}
    found = [task.evaluate(params, {}, [each], jax.random.key(0)) for each in (given, changed)]
    assert found[0] == found[1]


@pytest.mark.parametrize("target", ["tokens", "pixels", "normalized_pixels"])
def test_previews_show_masked_patches(target):
    task = make_task(target)
    params = nn.meta.unbox(jax.jit(task.init)(jax.random.key(0)))
    masked, drawn = tasks._predict(
        task.beit,
        TOKENIZER if target == "tokens" else None,
        params,
        task.frozen,
        jnp.asarray(images()),
        jax.random.key(2),
    )
    if target != "tokens":  # visible patches are the image's own
        visible = ~np.asarray(masked).reshape(-1, 4, 4).repeat(4, 1).repeat(4, 2)
        np.testing.assert_allclose(np.asarray(drawn)[visible], images()[visible] / 255, atol=1e-5)
    assert task.preview(params, task.frozen, batch(valid=3), jax.random.key(2)).dtype == np.uint8


def test_labels_are_learned_from_the_trunk_and_named():
    labels = Labels(2, ["dark", "light"])
    task = LabelTask(BEiT(dataclasses.replace(OPTIONS, target="labels", label_smoothing=0.1), SIZE, 2), labels)
    classes = np.arange(ROWS) % 2
    pixels = np.clip(images() // 4 + 150 * classes[:, None, None, None], 0, 255).astype(np.uint8)
    given = {"image": pixels, "text": classes[:, None].astype(np.int32), "valid": np.ones(ROWS, bool)}
    losses, metrics, params = trained(task, 30, given)
    assert metrics["accuracy"] == 1 and metrics["loss"] < losses[0]
    assert losses[-1] > 0.15  # the smoothed target: -(0.95 ln 0.95 + 0.05 ln 0.05)
    assert "100.0%" in task.in_words(metrics, ROWS)[0]
    assert task.preview(params, {}, given, jax.random.key(0)).dtype == np.uint8
