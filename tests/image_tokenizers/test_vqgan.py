"""The VQGAN's options and invariants. tests/pretrained/test_import_vqgan.py compares it with the authors' code."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.aot import model_flops
from dalle_jax.aot.program import Program
from dalle_jax.aot.target import load_target
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import shardings_of
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import tokenizer
from dalle_jax.image_tokenizers.vqgan import VQGANOptions, VQGANTokenizer
from dalle_jax.tasks.registry import abstract

SMALL = VQGANOptions(
    image_size=16, vocab_size=24, code_dim=6, latent=8, hidden=8, multipliers=(1, 2), blocks=1,
    attention_levels=(1,), norm_groups=4,
)  # fmt: skip
GUMBEL = dataclasses.replace(SMALL, quantizer="gumbel")
LIKE_MASKGIT = dict(
    downsampling="average", block_bias=False, skip="branch", middle_attention=False, attention_levels=(),
    code_layers=False, pixel_range="unit",
)  # fmt: skip
MASKGIT = dataclasses.replace(SMALL, **LIKE_MASKGIT, decoder_blocks=1, latent=6)


def make(options=SMALL, seed=0):
    made = VQGANTokenizer(options)
    return made, nn.meta.unbox(jax.jit(made.init)(jax.random.key(seed)))


def draw_images(rows=2, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, 3), np.uint8)


@pytest.mark.parametrize("options", [SMALL, GUMBEL, MASKGIT], ids=["nearest", "gumbel", "like MaskGIT"])
def test_shapes_and_dtypes(options):
    made, params = make(options)
    assert isinstance(made, tokenizer.ImageTokenizer) and made.downsample == 2
    tokens = jax.jit(made.encode)(params, draw_images(width=24))
    images = jax.jit(made.decode)(params, tokens)
    assert (tokens.shape, tokens.dtype) == ((2, 8, 12), jnp.int32)
    assert (images.shape, images.dtype) == ((2, 16, 24, 3), jnp.float32)
    assert 0 <= images.min() and images.max() <= 1
    assert jax.eval_shape(made.codebook, params).shape == (24, 6)


def test_tokens_are_the_nearest_codes():
    made, params = make()
    params["codes"]["vectors"] = jax.random.normal(jax.random.key(1), (24, 6))
    features, tokens = jax.jit(lambda *args: (made.features(*args), made.encode(*args)))(params, draw_images())
    distances = np.sum((np.asarray(features)[..., None, :] - np.asarray(params["codes"]["vectors"])) ** 2, axis=-1)
    np.testing.assert_array_equal(tokens, distances.argmin(-1))


def test_normalized_codes_depend_on_directions_only():
    made, params = make(dataclasses.replace(SMALL, normalized_codes=True))
    compute = jax.jit(lambda *args: (made.features(*args), made.codebook(args[0]), made.encode(*args)))
    features, codes, tokens = map(np.asarray, compute(params, draw_images()))
    for vectors in (features, codes):
        np.testing.assert_allclose(np.sum(vectors**2, axis=-1), 1, rtol=1e-5)
    np.testing.assert_array_equal(tokens, (features @ codes.T).argmax(-1))
    scales = np.random.default_rng(0).uniform(0.1, 9, (24, 1)).astype(np.float32)
    scaled = {**params, "codes": {"vectors": params["codes"]["vectors"] * scales}}
    _, scaled_codes, scaled_tokens = compute(scaled, draw_images())
    np.testing.assert_allclose(scaled_codes, codes, atol=1e-6)
    np.testing.assert_array_equal(scaled_tokens, tokens)


def test_pixel_ranges():
    """The network reads and returns pixels in its range, and images are the same in both."""
    images, pixels = draw_images(), np.linspace(-2, 2, 24, dtype=np.float32).reshape(1, 2, 4, 3)
    for made, low in ((VQGANTokenizer(SMALL), -1), (VQGANTokenizer(MASKGIT), 0)):
        scaled = made.scaled(np.array([0, 255], np.uint8))
        np.testing.assert_allclose(scaled, [low, 1])
        np.testing.assert_allclose(made.unscaled(made.scaled(images)), images / 255, atol=1e-6)
        expected = np.clip((pixels - low) / (1 - low), 0, 1)
        np.testing.assert_allclose(made.unscaled(pixels), expected, atol=1e-6)


def test_bfloat16_keeps_features_and_pixels_in_float32():
    made, params = make()
    half = VQGANTokenizer(dataclasses.replace(SMALL, dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0))))
    vectors = jax.random.normal(jax.random.key(0), (2, 8, 8, 6))
    for method, value in (("features", draw_images()), ("decode_vectors", vectors)):
        exact, coarse = (jax.jit(getattr(one, method))(params, value) for one in (made, half))
        assert coarse.dtype == jnp.float32
        assert 0 < jnp.abs(coarse - exact).max() < 0.1 * jnp.abs(exact).max()
        assert (coarse == coarse.astype(jnp.bfloat16).astype(jnp.float32)).mean() < 0.1, "rounded to bfloat16"


def test_every_large_parameter_is_split_over_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(VQGANTokenizer(VQGANOptions(quantizer="gumbel")).init, jax.random.key(0))
    leaves = jax.tree.leaves(nn.meta.unbox(boxed))
    for leaf, sharding in zip(leaves, jax.tree.leaves(shardings_of(boxed, mesh))):
        if leaf.size > 2**16:
            assert np.prod(sharding.shard_shape(leaf.shape)) * 4 == leaf.size


def counted(function, *args):
    with jax.default_matmul_precision("default"):  # products of exact float32 count several times
        lowered = jax.jit(function).lower(*args)
    return Program(lowered.compiler_ir("hlo").as_hlo_module().to_string()).flops


@pytest.mark.parametrize("kind", ["nearest", "gumbel", "like MaskGIT"])
def test_flops_are_those_of_the_program(kind):
    quantizer = "gumbel" if kind == "gumbel" else "nearest"
    options = VQGANOptions(
        image_size=64, vocab_size=512, code_dim=32, latent=32, hidden=32, multipliers=(1, 2, 2), attention_levels=(2,),
        quantizer=quantizer,
    )  # fmt: skip
    if kind == "like MaskGIT":
        options = dataclasses.replace(options, **LIKE_MASKGIT, decoder_blocks=2)
    made = VQGANTokenizer(options)
    params = jax.eval_shape(lambda key: nn.meta.unbox(made.init(key)), jax.random.key(0))
    found = made.flops(64)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    tokens = jax.ShapeDtypeStruct((1, 16, 16), jnp.int32)
    assert 1 <= found.encoding / counted(made.encode, params, images) < 1.06  # the program skips padded borders
    look_up = 2 * 16**2 * 512 * 32 if quantizer == "gumbel" else 0  # in training, codes are relaxed
    assert 1 <= (found.decoder - look_up) / counted(made.decode, params, tokens) < 1.06
    assert found.training > 3 * found.decoder + 2 * found.encoder
    ratio = made.flops(128).encoder / found.encoder
    assert 4.01 < ratio < 6 if options.attention_levels else ratio == 4  # attention grows faster


def test_a_prior_is_planned_with_it():
    """No part of a prior's training knows the kinds of tokenizers."""
    config = load_target("configs/maskgit.py", "batch_size=4,data.image_size=64,model.trunk.depth=2")
    made = VQGANTokenizer(dataclasses.replace(SMALL, image_size=64))
    task, batch = abstract(config, made)
    assert (task.prior.layout.image_vocab, task.prior.layout.image_length) == (24, 32 * 32)
    images = {**batch, "image": jax.ShapeDtypeStruct((4, 64, 64, 3), jnp.uint8)}
    encoded = {name: value for name, value in images.items() if name != "image"}  # before the training
    counts = [model_flops.training(task, each) for each in (images, encoded)]
    assert counts[0] - counts[1] == 4 * made.flops(64).encoding


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"attention_levels": (2,)}, "attention_levels"),
        ({"attention_levels": (1, 1)}, "attention_levels"),
        ({"attention_levels": (1, 0)}, "attention_levels"),
        ({"norm_groups": 3}, "norm_groups"),
        ({"quantizer": "lookup_free"}, "quantizer"),
        ({"quantizer": "gumbel", "normalized_codes": True}, "normalized_codes"),
        ({"dtype": "float16"}, "dtype"),
        ({"downsampling": "max"}, "downsampling"),
        ({"skip": "none"}, "skip"),
        ({"pixel_range": "bytes"}, "pixel_range"),
        ({"decoder_blocks": 0}, "decoder_blocks"),
        ({"code_layers": False}, "latent=6"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"image_size": 17}, "17"),
    ],
)
def test_invalid_options(change, key):
    with pytest.raises(ConfigError, match=key):
        dataclasses.replace(SMALL, **change)


def test_an_image_size_that_tokens_do_not_divide():
    made, params = make()
    with pytest.raises(ConfigError, match="17"):
        made.encode(params, np.zeros((1, 16, 17, 3), np.uint8))


def test_description_survives_json():
    for options in (SMALL, GUMBEL, MASKGIT, VQGANOptions()):
        made = VQGANTokenizer(options)
        again = tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict(made))))
        assert again == made and hash(again) == hash(made)
    config = {"task": "vqgan", "data": {"image_size": 16}, "model": {**dataclasses.asdict(SMALL)}}
    del config["model"]["image_size"]
    assert tokenizer.of_training(config) == VQGANTokenizer(SMALL)
