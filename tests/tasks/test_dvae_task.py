"""The dVAE's loss and metrics against numpy, one golden update, and training on one batch."""

import dataclasses

import flax.linen as nn
import golden_updates
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from dalle_jax.checkpoints.best import BestMetric
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import logit_laplace
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.image_tokenizers.relaxation import gumbel_softmax
from dalle_jax.optim import schedules
from dalle_jax.optim.optimizers import OptimizerOptions, make_optimizer
from dalle_jax.reporting.images import to_uint8
from dalle_jax.tasks.dvae import DVAETask
from dalle_jax.tasks.registry import build

OPTIONS = DVAEOptions(
    image_size=16, vocab_size=24, hidden=16, groups=1, blocks_per_group=1, codebook_dim=8, in_kernel=3, stem_factor=4
)


def make_task(temperature=0.5, kl_weight=3.0, options=OPTIONS):
    return DVAETask(DVAETokenizer(options), schedules.Constant(temperature), schedules.Cosine(0.0, kl_weight, 10))


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture(scope="module")
def params(task):
    return nn.meta.unbox(jax.jit(task.init)(jax.random.key(0)))


def draw_images(rows, seed=0):
    """Draws smooth random images, uint8 [rows, 16, 16, 3]."""
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, 4, 4, 3), np.uint8)
    return blocks.repeat(4, axis=1).repeat(4, axis=2)


def batch(rows, valid=None, seed=0):
    return {"image": draw_images(rows, seed), "valid": np.ones(rows, bool) if valid is None else np.asarray(valid)}


def negative_log_likelihood(images, mean, log_scale):
    """Computes nats per subpixel, [B], from the formula."""
    x, mean, log_scale = (np.asarray(v, np.float64) for v in (logit_laplace.map_pixels(images), mean, log_scale))
    log_f = -np.log(2 * np.exp(log_scale) * x * (1 - x)) - np.abs(np.log(x / (1 - x)) - mean) / np.exp(log_scale)
    return -log_f.mean((1, 2, 3))


# -- loss ---------------------------------------------------------------------------------------------------------


def test_loss_and_its_terms(task, params):
    images, key = draw_images(16), jax.random.key(3)
    loss, scalars = jax.jit(task.loss)(params, {}, {"image": images}, key, jnp.int32(5))

    made = task.tokenizer
    logits = np.asarray(made.encode_logits(params, images), np.float64)
    relaxed = negative_log_likelihood(images, *made.decode_maps(params, gumbel_softmax(jnp.float32(logits), key, 0.5)))
    q = np.exp(logits - logits.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    kl = (q * np.log(q * 24)).sum(-1)  # [B, h, w]
    subpixels = 16 * 16 * 3
    half_way = 1.5  # of the cosine from 0 to 3 in 10 updates, at update 5
    np.testing.assert_allclose(scalars["reconstruction_nats"], relaxed.mean(), rtol=1e-4)
    np.testing.assert_allclose(scalars["kl_nats"], kl.mean(), rtol=1e-3)
    np.testing.assert_allclose(loss, relaxed.mean() + half_way * kl.sum((1, 2)).mean() / subpixels, rtol=1e-4)
    np.testing.assert_allclose(scalars["elbo"], -(relaxed.mean() + kl.sum((1, 2)).mean() / subpixels), rtol=1e-4)

    tokens = logits.argmax(-1)
    counts = np.bincount(tokens.ravel(), minlength=24) / tokens.size
    entropy = -(counts[counts > 0] * np.log(counts[counts > 0])).sum()
    np.testing.assert_allclose(scalars["codebook_perplexity"], np.exp(entropy), rtol=1e-4)
    np.testing.assert_allclose(scalars["codebook_usage"], (counts > 0).mean(), rtol=1e-5)

    probe = slice(None, None, 8)
    true = negative_log_likelihood(images[probe], *made.decode_maps(params, jnp.int32(tokens[probe])))
    np.testing.assert_allclose(scalars["relaxation_gap"], true.mean() - relaxed[probe].mean(), atol=1e-5)
    error = made.decode(params, jnp.int32(tokens[probe])) - images[probe] / 255.0
    np.testing.assert_allclose(scalars["psnr"], -10 * np.log10(np.mean(np.square(error))), rtol=1e-4)


def test_the_kl_weight_moves_with_the_step(task, params):
    kl = lambda step: jax.jit(task.loss)(params, {}, batch(2), jax.random.key(0), jnp.int32(step))[0]  # noqa: E731
    _, scalars = task.loss(params, {}, batch(2), jax.random.key(0), jnp.int32(0))
    np.testing.assert_allclose(kl(0), scalars["reconstruction_nats"], rtol=1e-5)
    np.testing.assert_allclose(kl(10) - kl(0), 3.0 * scalars["kl_nats"] * 16 / 768, rtol=1e-3)


def test_every_parameter_is_trained(task, params):
    grads = jax.jit(jax.grad(lambda p: task.loss(p, {}, batch(8), jax.random.key(0), jnp.int32(9))[0]))(params)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)


def test_tokens_are_measured_but_not_trained_on(task, params):
    """The gradient of the loss is that of the relaxed bound only."""
    images, key = draw_images(8), jax.random.key(0)

    def relaxed(p):
        codes = gumbel_softmax(task.tokenizer.encode_logits(p, images), key, 0.5)
        mean, log_scale = task.tokenizer.decode_maps(p, codes)
        return -logit_laplace.log_prob(logit_laplace.map_pixels(images), mean, log_scale).mean()

    ours = jax.jit(jax.grad(lambda p: task.loss(p, {}, {"image": images}, key, jnp.int32(0))[0]))(params)
    expected = jax.jit(jax.grad(relaxed))(params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, atol=1e-6)


# -- golden numbers -----------------------------------------------------------------------------------------------


def test_golden_update():
    golden_updates.check("dvae")


# -- evaluation ---------------------------------------------------------------------------------------------------


def test_evaluation_excludes_padding(task, params):
    whole = task.evaluate(params, {}, [batch(6)], jax.random.key(0))
    padded = batch(6)
    padded["image"] = np.concatenate([padded["image"], np.full((2, 16, 16, 3), 255, np.uint8)])
    padded["valid"] = np.array([True] * 6 + [False] * 2)
    parts = [{name: value[:4] for name, value in padded.items()}, {name: value[4:] for name, value in padded.items()}]
    split = task.evaluate(params, {}, parts, jax.random.key(1))
    assert whole.keys() == split.keys()
    for name in whole:
        np.testing.assert_allclose(whole[name], split[name], rtol=1e-4, err_msg=name)
    assert BestMetric.parse(task.best_metric).loss(whole) == -whole["psnr"]


def test_evaluation_decodes_tokens(task, params):
    measured = task.evaluate(params, {}, [batch(6)], jax.random.key(0))
    images, tokens = draw_images(6), task.tokenizer.encode(params, draw_images(6))
    error = task.tokenizer.decode(params, tokens) - images / 255.0
    np.testing.assert_allclose(measured["psnr"], -10 * np.log10(np.mean(np.square(error))), rtol=1e-5)
    nats = negative_log_likelihood(images, *task.tokenizer.decode_maps(params, tokens))
    np.testing.assert_allclose(measured["reconstruction_nats"], nats.mean(), rtol=1e-4)


def test_preview_has_each_image_next_to_its_reconstruction(task, params):
    """Only valid rows are shown. Without captions, no space is left for them."""
    made = batch(5)
    made["valid"][[0, 3]] = False
    preview = task.preview(params, {}, made, jax.random.key(0))
    images = draw_images(5)
    shown = to_uint8(task.tokenizer.decode(params, task.tokenizer.encode(params, images)))
    top, left, cell, gap = preview.shape[0] - 3 * (96 + 8) - 16, 16, 96, 8
    for row, index in enumerate([1, 2, 4]):
        for column, expected in enumerate((images[index], shown[index])):
            y, x = top + row * (cell + gap), left + column * (cell + gap)
            cells = preview[y : y + cell, x : x + cell]
            np.testing.assert_array_equal(cells[3::6, 3::6], expected)
    assert preview.shape[1] == 2 * left + 2 * (cell + gap) + gap and preview.dtype == np.uint8


# -- learning -----------------------------------------------------------------------------------------------------


def test_overfitting_one_batch_exceeds_25_decibels():
    steps, images = 200, draw_images(2)  # 32 patches of different colours: more than there are codes
    options = dataclasses.replace(OPTIONS, vocab_size=24, hidden=96, codebook_dim=96, in_kernel=1, min_log_scale=-2.0)
    temperature, kl_weight = schedules.Cosine(0.25, 1 / 16, steps // 2), schedules.Constant(0.05)
    task = DVAETask(DVAETokenizer(options), temperature, kl_weight, start_from=(images, 10.0))
    optimizer = optax.chain(
        make_optimizer(OptimizerOptions(scales={"encoder": 0.02})),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(1e-2, steps)),
    )

    @jax.jit
    def train(key):
        def update(carry, step):
            params, opt_state = carry
            key_now = jax.random.fold_in(key, step)
            grads = jax.grad(lambda p: task.loss(p, {}, {"image": images}, key_now, step)[0])(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        params = nn.meta.unbox(task.init(key))
        return jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(steps))[0][0]

    fresh = jax.jit(lambda key: nn.meta.unbox(task.init(key)))(jax.random.key(0))
    untrained = task.evaluate(fresh, {}, [batch(2)], jax.random.key(0))
    measured = task.evaluate(train(jax.random.key(0)), {}, [batch(2)], jax.random.key(0))
    assert measured["psnr"] > max(25.0, untrained["psnr"] + 5.0), (untrained, measured)


# -- from a configuration -----------------------------------------------------------------------------------------


def config(tmp_path, **model):
    from PIL import Image

    for i, image in enumerate(draw_images(5)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"image {i}")
    sizes = {"vocab_size": 24, "hidden": 16, "groups": 1, "blocks_per_group": 1, "codebook_dim": 8, "in_kernel": 3}
    return ConfigDict(
        {
            "task": "dvae",
            "seed": 0,
            "data": {"source": "folder", "path": str(tmp_path), "image_size": 16, "eval_split": "all"},
            "model": {**sizes, "stem_factor": 4, **model},
            "objective": {"init": "paper"},
            "schedules": {
                "temperature": {"kind": "cosine", "start": 1.0, "end": 1 / 16, "steps": 100},
                "kl_weight": {"kind": "constant", "value": 1.0},
            },
            "batch_size": 4,
        }
    )


def test_the_job_of_a_configuration(tmp_path):
    job = build(config(tmp_path), str(tmp_path / "run"))
    assert job.task.tokenizer.options == OPTIONS
    assert job.task.schedules["temperature"](100) == 1 / 16
    training, evaluation = next(job.train_batches()), list(job.eval_batches())
    assert training["image"].shape == (4, 16, 16, 3) and training["image"].dtype == np.uint8
    assert len(evaluation) == 2 and evaluation[1]["valid"].tolist() == [True, False, False, False]
    assert dict(job.data_counts()) == {}


def test_an_invalid_configuration(tmp_path):
    with pytest.raises(ConfigError, match="18"):
        wrong = config(tmp_path)
        wrong.data.image_size = 18
        build(wrong, "")
    with pytest.raises(ConfigError, match="depth"):
        build(config(tmp_path, depth=3), "")
    with pytest.raises(ConfigError, match="kl_weight"):
        wrong = config(tmp_path)
        wrong.schedules.kl_weight.kind = "sigmoid"
        build(wrong, "")
