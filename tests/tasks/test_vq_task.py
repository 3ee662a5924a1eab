"""The vector-quantised tokenizer: its start, training on a few images, resuming, and its descriptions."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import on_mesh
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.signed_pixels import from_signed, to_signed
from dalle_jax.image_tokenizers.vq import VQTokenizer
from dalle_jax.image_tokenizers.vq_network import VQOptions
from dalle_jax.optim import schedules
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions, make_optimizer
from dalle_jax.tasks.vq import VQObjectiveOptions, VQTask
from dalle_jax.training.step import make_init, make_train_step

OPTIONS = VQOptions(
    image_size=16, tokens_per_side=4, vocab_size=24, code_dim=12, hidden=16, encoder_blocks=1, decoder_blocks=1
)


def draw_images(rows=32, seed=0):
    """Draws coloured bars on a grid that does not fit the blocks of the tokens, uint8 [rows, 16, 16, 3]."""
    rng = np.random.default_rng(seed)
    images = np.full((rows, 16, 16, 3), 255, np.uint8)
    for image in images:
        top, left = rng.integers(0, 12, 2)
        image[top : top + 6, left : left + 3] = rng.integers(0, 256, 3)
        image[:, rng.integers(0, 16)] = rng.integers(0, 256, 3)
    return images


def make_task(options=OPTIONS, start=True, **objective):
    return VQTask(VQTokenizer(options), VQObjectiveOptions(**objective), draw_images() if start else None)


def batch(rows=32, seed=0):
    return {"image": draw_images(rows, seed), "valid": np.ones(rows, bool)}


class Run:
    """A training on one batch of images."""

    def __init__(self, task, mesh=(1, 1, 1), **optimizer):
        self.mesh = make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
        options = OptimizerOptions(b2=0.99, clip_norm=1.0, **optimizer)
        average, transformation = AverageOptions(decay=0.9), make_optimizer(options)
        init, abstract = make_init(task, transformation, average, self.mesh, 0)
        rate = {"learning_rate": schedules.Constant(3e-3)}
        self.step = make_train_step(task, transformation, options, average, rate, abstract)
        with on_mesh(self.mesh):
            self.state = init()

    def train(self, steps, state=None):
        state = self.state if state is None else state
        with on_mesh(self.mesh):
            for _ in range(steps):
                state, self.scalars = self.step(state, {}, {"image": draw_images()}, jax.random.key(0))
        return state


@pytest.fixture(scope="module")
def task():
    return make_task()


@pytest.fixture(scope="module")
def run(task):
    return Run(task)


def psnr(task, params):
    return task.evaluate(params, {}, [batch()], jax.random.key(0))["psnr"]


def test_training_improves_on_a_good_start(task, run):
    random_start = nn.meta.unbox(jax.jit(make_task(start=False).init)(jax.random.key(0)))
    start = psnr(task, run.state.params)
    assert start > psnr(task, random_start) + 5
    state = run.train(60)
    assert psnr(task, state.params) > start + 1
    assert set(run.scalars.names) > {"psnr", "codebook_perplexity", "codebook_usage", "reconstruction", "commitment"}
    assert np.all(np.isfinite(jax.tree.leaves(run.scalars)))


def test_the_start_is_the_best_linear_code_of_a_block():
    """With one code per block and all components, reconstructions of the start are exact."""
    options = VQOptions(
        image_size=8, tokens_per_side=2, vocab_size=8, code_dim=48, hidden=16, encoder_blocks=0, decoder_blocks=0
    )
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    task = VQTask(VQTokenizer(options), VQObjectiveOptions(), images)
    params = nn.meta.unbox(jax.jit(task.init)(jax.random.key(0)))
    tokens = task.tokenizer.encode(params, images)
    assert len(np.unique(tokens)) == 8
    np.testing.assert_allclose(task.tokenizer.decode(params, tokens), images / 255, atol=2e-3)


def test_resumed_equals_uninterrupted(run):
    whole = run.train(6)
    stored = jax.tree.map(np.asarray, run.train(3))
    resumed = run.train(3, jax.tree.map(lambda value, like: jax.device_put(value, like.sharding), stored, whole))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed)):
        np.testing.assert_array_equal(a, b)


def test_slices_of_the_batch_renew_the_codes_as_the_whole_batch_does(task, run):
    sliced = Run(task, accumulate_steps=4).train(1)
    whole = run.train(1)
    for name, value in whole.params["codes"].items():
        np.testing.assert_allclose(sliced.params["codes"][name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_a_mesh_of_devices_computes_the_same_codes(task, run):
    if len(jax.devices()) < 8:
        pytest.skip("needs 8 devices")
    whole = run.train(3)
    split = Run(task, (2, 2, 2)).train(3)
    for name, value in whole.params["codes"].items():
        np.testing.assert_allclose(split.params["codes"][name], value, rtol=1e-2, atol=1e-2, err_msg=name)


def test_bfloat16_keeps_codes_in_float32():
    task = make_task(VQOptions(**{**OPTIONS.__dict__, "dtype": "bfloat16"}))
    state = Run(task).train(2)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state.params))
    assert np.isfinite(psnr(task, state.params))


def test_tokens_and_images_have_the_shapes_of_the_protocol(task, run):
    tokenizer, params = task.tokenizer, run.state.params
    assert isinstance(tokenizer, tokenizers.ImageTokenizer)
    for side in (16, 24):
        images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
        tokens = tokenizer.encode(params, images)
        assert tokens.shape == (2, *tokenizer.grid(side)) and tokens.dtype == jnp.int32
        decoded = tokenizer.decode(params, tokens)
        assert decoded.shape == images.shape and 0 <= decoded.min() and decoded.max() <= 1
    assert tokenizer.codebook(params).shape == (24, 12)
    shown = task.preview(params, {}, {**batch(), "index": np.arange(32)}, jax.random.key(0))
    assert shown.dtype == np.uint8


def test_evaluation_ignores_padding(task, run):
    whole = task.evaluate(run.state.params, {}, [batch(6)], jax.random.key(0))
    padded = {"image": np.concatenate([draw_images(6), draw_images(2, 9)]), "valid": np.arange(8) < 6}
    found = task.evaluate(run.state.params, {}, [padded], jax.random.key(0))
    assert found == pytest.approx(whole, rel=1e-5)


def test_pixels_survive_the_mapping():
    images = np.arange(256, dtype=np.uint8)
    np.testing.assert_allclose(from_signed(to_signed(images)), images / 255, atol=1e-6)


def test_descriptions_read_back():
    made = VQTokenizer(OPTIONS)
    assert tokenizers.from_dict(tokenizers.to_dict(made)) == made
    model = {name: value for name, value in OPTIONS.__dict__.items() if name != "image_size"}
    assert tokenizers.of_training({"task": "vq", "model": model, "data": {"image_size": 16}}) == made


@pytest.mark.parametrize("values, key", [
    (dict(image_size=30, tokens_per_side=8), "tokens_per_side"),
    (dict(image_size=32, tokens_per_side=16), "code_dim"),
    (dict(dtype="float16"), "dtype"),
    (dict(encoder_blocks=-1), "encoder_blocks"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_rejected(values, key):
    with pytest.raises(ConfigError, match=key):
        VQOptions(**values)


@pytest.mark.parametrize("values, key", [
    (dict(init="kmeans"), "init"), (dict(commitment=-1.0), "commitment"), (dict(code_decay=1.0), "code_decay"),
])  # fmt: skip
def test_objectives_that_make_no_sense_are_rejected(values, key):
    with pytest.raises(ConfigError, match=key):
        VQObjectiveOptions(**values)


def test_a_training_without_a_tokenizer_is_rejected():
    with pytest.raises(ConfigError, match="prior"):
        tokenizers.of_training({"task": "prior", "model": {}, "data": {"image_size": 16}})
