"""The dVAE's pure functions against brute force, and its modules' invariants."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import shardings_of
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import logit_laplace, tokenizer
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.image_tokenizers.relaxation import gumbel_softmax, kl_to_uniform
from dalle_jax.image_tokenizers.resampling import depth_to_space, max_pool, space_to_depth, upsample

SMALL = DVAEOptions(
    image_size=16, vocab_size=24, hidden=8, groups=2, blocks_per_group=1, codebook_dim=6, in_kernel=3, stem_factor=2
)


def make(options=SMALL, seed=0):
    made = DVAETokenizer(options)
    return made, nn.meta.unbox(jax.jit(made.init)(jax.random.key(seed)))


def draw_images(rows=2, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (rows, size, size, 3), np.uint8)


# -- pixels -------------------------------------------------------------------------------------------------------


def test_map_pixels_scales_and_unmap_pixels_inverts():
    levels = np.arange(256, dtype=np.uint8)
    mapped = logit_laplace.map_pixels(levels)
    np.testing.assert_allclose(mapped[[0, 255]], [0.1, 0.9], rtol=1e-6)
    np.testing.assert_allclose(logit_laplace.unmap_pixels(mapped) * 255, levels, atol=1e-4)
    np.testing.assert_array_equal(logit_laplace.unmap_pixels(jnp.array([0.0, 1.0])), [0.0, 1.0])


@pytest.mark.parametrize(("mean", "log_scale"), [(0.0, 0.0), (1.3, -1.0), (-2.0, 0.7)])
def test_logit_laplace_is_a_density(mean, log_scale):
    x = (np.arange(200_000) + 0.5) / 200_000
    density = np.exp(np.asarray(logit_laplace.log_prob(x, mean, log_scale), np.float64))
    assert abs(density.mean() - 1) < 2e-3
    # The median is sigmoid(mean).
    assert abs(density[x < 1 / (1 + np.exp(-mean))].sum() / len(x) - 0.5) < 2e-3


def test_logit_laplace_equals_the_formula():
    x, mean, scale = 0.3, 0.4, 0.25
    expected = -np.log(2 * scale * x * (1 - x)) - abs(np.log(x / (1 - x)) - mean) / scale
    np.testing.assert_allclose(logit_laplace.log_prob(x, mean, np.log(scale)), expected, rtol=1e-5)


# -- relaxation ---------------------------------------------------------------------------------------------------


def test_gumbel_softmax_is_a_distribution_and_approaches_one_hot():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 10))
    warm = gumbel_softmax(logits, jax.random.key(1), 1.0)
    np.testing.assert_allclose(warm.sum(-1), 1.0, rtol=1e-5)
    cold = gumbel_softmax(logits, jax.random.key(1), 1e-3)
    np.testing.assert_array_equal(cold.argmax(-1), warm.argmax(-1))  # the temperature does not change the argmax
    assert cold.max(-1).min() > 0.99 > warm.max(-1).max()


def test_gumbel_softmax_samples_the_softmax():
    logits = jnp.array([0.0, 1.0, -1.0, 2.0])
    samples = gumbel_softmax(jnp.broadcast_to(logits, (20_000, 4)), jax.random.key(0), 1 / 16)
    frequencies = np.bincount(samples.argmax(-1), minlength=4) / 20_000
    np.testing.assert_allclose(frequencies, jax.nn.softmax(logits), atol=0.015)


def test_kl_to_uniform():
    logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32) * 3
    q = np.exp(logits.astype(np.float64))
    q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(kl_to_uniform(logits), (q * np.log(q * 7)).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(kl_to_uniform(jnp.zeros((5, 7))), np.zeros(5), atol=1e-6)
    np.testing.assert_allclose(kl_to_uniform(200.0 * jnp.eye(7)), np.full(7, np.log(7)), rtol=1e-5)


# -- shapes -------------------------------------------------------------------------------------------------------


def test_space_to_depth_keeps_blocks_together_and_is_inverted():
    x = draw_images().astype(np.float32)
    blocks = space_to_depth(x, 4)
    assert blocks.shape == (2, 4, 4, 48)
    np.testing.assert_array_equal(blocks[1, 2, 3].reshape(4, 4, 3), x[1, 8:12, 12:16])
    np.testing.assert_array_equal(depth_to_space(blocks, 4), x)


def test_upsample_repeats_and_max_pool_halves():
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 2)).astype(np.float32)
    np.testing.assert_array_equal(upsample(x), x.repeat(2, 1).repeat(2, 2))
    np.testing.assert_array_equal(max_pool(x), x.reshape(1, 2, 2, 2, 2, 2).max((2, 4)))


@pytest.mark.parametrize(
    ("changes", "downsample"),
    [
        ({}, 4),
        ({"stem_factor": 1}, 2),
        ({"groups": 1, "stem_factor": 4}, 4),
        pytest.param({"groups": 3, "blocks_per_group": 2}, 8, marks=pytest.mark.slow),
    ],
)
def test_shapes_and_dtypes(changes, downsample):
    made, params = make(dataclasses.replace(SMALL, **changes))
    assert made.downsample == downsample
    side = 16 // downsample
    logits = jax.jit(made.encode_logits)(params, draw_images())
    tokens = jax.jit(made.encode)(params, draw_images())
    images = jax.jit(made.decode)(params, tokens)
    assert (logits.shape, logits.dtype) == ((2, side, side, 24), jnp.float32)
    assert (tokens.shape, tokens.dtype) == ((2, side, side), jnp.int32)
    assert (images.shape, images.dtype) == ((2, 16, 16, 3), jnp.float32)
    assert 0 <= images.min() and images.max() <= 1
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_bfloat16_keeps_logits_and_maps_in_float32():
    made, params = make()
    half = DVAETokenizer(dataclasses.replace(SMALL, dtype="bfloat16"))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(jax.eval_shape(half.init, jax.random.key(0))))
    logits = jax.jit(half.encode_logits)(params, draw_images())
    maps = jax.jit(half.decode_maps)(params, jnp.zeros((2, 4, 4), jnp.int32))
    assert logits.dtype == maps[0].dtype == maps[1].dtype == jnp.float32
    exact = jax.jit(made.encode_logits)(params, draw_images())
    assert 0 < jnp.abs(logits - exact).max() < 0.05 * jnp.abs(exact).max()


def test_bfloat16_computes_the_distribution_of_pixels_in_float32():
    """The values of a bfloat16 product that is cast afterwards would all be bfloat16 numbers."""
    _, params = make()
    half = DVAETokenizer(dataclasses.replace(SMALL, dtype="bfloat16"))
    tokens = jax.random.randint(jax.random.key(0), (2, 4, 4), 0, 24)
    for name, values in zip(("mean", "log_scale"), jax.jit(half.decode_maps)(params, tokens)):
        coarse = values == values.astype(jnp.bfloat16).astype(jnp.float32)
        assert coarse.mean() < 0.05, name


def test_larger_images_than_in_training():
    made, params = make()
    tokens = jax.jit(made.encode)(params, np.zeros((1, 32, 24, 3), np.uint8))
    assert tokens.shape == (1, 8, 6)
    assert jax.jit(made.decode)(params, tokens).shape == (1, 32, 24, 3)


# -- invariants ---------------------------------------------------------------------------------------------------


def test_tokens_decode_as_their_one_hot_codes():
    made, params = make()
    params["codebook"]["bias"] = jnp.arange(6.0)
    tokens = jax.random.randint(jax.random.key(0), (2, 4, 4), 0, 24)
    decode = jax.jit(made.decode_maps)
    for ours, expected in zip(decode(params, tokens), decode(params, jax.nn.one_hot(tokens, 24))):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_initial_weights_have_the_papers_scale():
    # Weights are N(0, 1/√(n_in k²)), biases 0. The decoder's n_in at its 1x1 input convolution is the vocabulary.
    _, params = make(dataclasses.replace(SMALL, hidden=64, vocab_size=512, codebook_dim=32))
    for path, leaf in jax.tree.leaves_with_path(params):
        if path[-1].key == "bias":
            assert not leaf.any()
        else:
            fan_in = np.prod(leaf.shape[:-1])
            np.testing.assert_allclose(leaf.std() * fan_in**0.5, 1.0, atol=0.1, err_msg=jax.tree_util.keystr(path))


def test_scales_of_the_initial_output_layer_and_codebook():
    _, params = make()
    _, scaled = make(dataclasses.replace(SMALL, logit_scale=3.0, codebook_scale=5.0))
    old, new = params["encoder"]["output"]["kernel"], scaled["encoder"]["output"]["kernel"]
    np.testing.assert_allclose(3 * old, new, rtol=1e-5)
    np.testing.assert_allclose(5 * params["codebook"]["kernel"], scaled["codebook"]["kernel"], rtol=1e-5)


def test_parameter_counts_at_full_size():
    boxed = jax.eval_shape(DVAETokenizer(DVAEOptions()).init, jax.random.key(0))
    params = nn.meta.unbox(boxed)
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert count(params["encoder"]) == 53_786_240
    assert count(params["codebook"]) + count(params["decoder"]) == 43_829_766


def test_every_large_parameter_is_split_over_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    boxed = jax.eval_shape(DVAETokenizer(DVAEOptions()).init, jax.random.key(0))
    leaves = jax.tree.leaves(nn.meta.unbox(boxed))
    for leaf, sharding in zip(leaves, jax.tree.leaves(shardings_of(boxed, mesh))):
        if leaf.size > 2**16:
            assert np.prod(sharding.shard_shape(leaf.shape)) * 4 == leaf.size


# -- errors and descriptions --------------------------------------------------------------------------------------


def test_an_image_size_that_tokens_do_not_divide():
    with pytest.raises(ConfigError, match="30"):
        dataclasses.replace(SMALL, image_size=30)
    made, params = make()
    with pytest.raises(ConfigError, match="18"):
        made.encode(params, np.zeros((1, 16, 18, 3), np.uint8))
    with pytest.raises(ConfigError):
        made.grid(33)
    assert made.grid(32) == (8, 8)


@pytest.mark.parametrize(
    "change", [{"hidden": 6}, {"vocab_size": 0}, {"in_kernel": 4}, {"dtype": "float16"}, {"groups": -1}]
)
def test_invalid_options(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)


def test_description_survives_json():
    made, _ = make()
    again = tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict(made))))
    assert isinstance(again, DVAETokenizer) and again.options == SMALL
    with pytest.raises(ConfigError, match="vqvae"):
        tokenizer.from_dict({"kind": "vqvae"})
    with pytest.raises(ConfigError, match="heads"):
        tokenizer.from_dict({**tokenizer.to_dict(made), "heads": 3})


def test_from_config_reads_the_image_size_of_the_data():
    model = {name: value for name, value in dataclasses.asdict(SMALL).items() if name != "image_size"}
    config = {"task": "dvae", "data": {"image_size": 16}, "model": model}
    assert tokenizer.of_training(config).options == SMALL
    with pytest.raises(ConfigError, match="hiden"):
        tokenizer.of_training({**config, "model": {"hiden": 3}})


def test_equal_tokenizers_compile_once():
    one, other = (DVAETokenizer(DVAEOptions(image_size=16, groups=1, stem_factor=4)) for _ in range(2))
    assert one == other and hash(one) == hash(other) and one is not other
    assert one != DVAETokenizer(DVAEOptions(image_size=32, groups=1, stem_factor=4))
    size = jax.jit(lambda tokenizer, x: x * tokenizer.downsample, static_argnums=0)
    assert size(one, 1) == size(other, 1) == 4 and size._cache_size() == 1
