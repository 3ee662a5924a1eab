"""Parameters that are converted once for drawing: fewer bytes, the same tokens."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prior_cases import autoregressive, changed, drawn, maskgit, params_of, rows

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.errors import ConfigError
from dalle_jax.models.trunk import TRUNKS, for_decoding
from dalle_jax.priors.decoding_weights import check_weights, for_drawing, quantized
from dalle_jax.pytree import by_path

SCANNED = {"dtype": "bfloat16", "depth": 4, "scan": True, "remat": "full", "norm": "rmsnorm", "qk_norm": True}
PRIORS = {
    "autoregressive": autoregressive(SCANNED),
    "any order": autoregressive(SCANNED, attention="full", order="random", tied_embeddings=True),
    "encoder": autoregressive(
        {**SCANNED, "norm_placement": "normformer", "embedding_norm": True}, encoder_depth=4, encoder_padding=1
    ),
    "maskgit": maskgit(SCANNED),
    "maskgit, small data": maskgit(SCANNED, head="linear", tied_embeddings=False, neighbour_kernel=3),
    "float32 logits": maskgit({**SCANNED, "float32_logits": True}, tied_embeddings=False),
}
TEXT, TOKENS = rows(2)
KEYS = jax.random.split(jax.random.key(5), 4)


def converted(prior, params, weights=None, **mesh):
    return for_drawing(prior, jax.tree.map(jnp.asarray, params), make_mesh(**{"data": 1, **mesh}), weights)


@pytest.mark.parametrize("name", PRIORS)
def test_a_converted_prior_draws_the_same_tokens(name):
    prior = PRIORS[name]
    params = drawn(prior)
    other, weights = converted(prior, params)
    assert not other.options.trunk.scan
    for part in TRUNKS if prior.options.encoder_depth else ("trunk",):
        assert "units" in params[part] and set(weights[part]) == {*(f"layer_{i}" for i in range(4)), "final_norm"}
    draw = lambda prior, params: np.asarray(prior.sample(params, TEXT, KEYS, guidance=1.0))
    tokens = draw(prior, params)
    np.testing.assert_array_equal(draw(other, weights), tokens)
    assert len(np.unique(tokens)) > 5
    loss = lambda prior, params: float(prior.loss(params, TEXT, TOKENS, jax.random.key(0), train=False)[0])
    assert loss(other, weights) == pytest.approx(loss(prior, params), rel=1e-2)


@pytest.mark.parametrize("name", PRIORS)
def test_dtypes_and_bytes_of_converted_parameters(name):
    prior = PRIORS[name]
    weights = by_path(converted(prior, drawn(prior))[1])
    for path, leaf in weights.items():
        untied = path.endswith("head_kernel")
        kernel = path.split("/")[0] in (*TRUNKS, "head") and path.endswith("/kernel")
        half = kernel or (untied and not prior.options.trunk.float32_logits)
        assert leaf.dtype == (jnp.bfloat16 if half else jnp.float32), path
    halves = sum(leaf.size for leaf in weights.values() if leaf.dtype == jnp.bfloat16)
    size = sum(leaf.size for leaf in jax.tree.leaves(drawn(prior)))
    assert sum(leaf.nbytes for leaf in weights.values()) == 4 * size - 2 * halves and halves > size / 2


def test_a_float32_prior_stays_as_it_is():
    prior = maskgit({"scan": True})
    params = params_of(prior)
    assert for_drawing(prior, params, make_mesh(data=1)) == (prior, params)


@pytest.mark.parametrize("kind", [autoregressive, maskgit])
def test_layers_of_trunk_and_encoder_are_unstacked_alike(kind):
    """Logits of scanned layers are those of the same layers one by one; the encoder has fewer of them."""
    options = {"dtype": "float32", "depth": 4, "scan": True, "remat": "full"}
    prior = kind(options, encoder_depth=2)
    params = drawn(prior)
    flat, unstacked = for_decoding(params, prior.options)
    assert [len(flat[part]) for part in TRUNKS] == [5, 3] if TRUNKS[0] == "trunk" else [3, 5]
    other = dataclasses.replace(prior, options=unstacked)
    logits = lambda prior, params: jax.jit(prior.model.apply)({"params": params}, TEXT, TOKENS)
    found, expected = logits(other, flat), logits(prior, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


def test_both_copies_are_never_in_memory():
    """Each float32 kernel is gone before the next one is converted."""
    prior = PRIORS["autoregressive"]
    params = jax.tree.map(jnp.array, drawn(prior))
    kernel = params["trunk"]["units"]["layer_0"]["mlp"]["up"]
    before = kernel["kernel"]
    for_drawing(prior, params, make_mesh(data=1))
    assert kernel["kernel"].dtype == jnp.bfloat16 and kernel["kernel"].shape == before.shape


def test_converted_parameters_are_split_over_the_mesh():
    prior = changed(PRIORS["maskgit"], {"width": 32})
    weights = converted(prior, drawn(prior), fsdp=2)[1]
    kernel = weights["trunk"]["layer_3"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and kernel.addressable_shards[0].data.size == kernel.size // 2


# -- int8 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs, stacked", [(1, False), (2, False), (1, True), (2, True)])
def test_rounding_of_a_kernel(inputs, stacked):
    """Each output has the smallest scale that fits; a rounded number is off by half a scale at most."""
    kernel = np.random.default_rng(0).normal(size=(3, 4, 5, 6)[not stacked :]).astype(np.float32)
    kernel[..., 2] = 0
    whole, scale = map(np.asarray, quantized(kernel, inputs, stacked))
    outputs = kernel.shape[stacked + inputs :]
    assert whole.dtype == np.int8 and whole.shape == kernel.shape
    assert scale.dtype == np.float32 and scale.shape == kernel.shape[:stacked] + outputs
    axes = tuple(range(stacked, stacked + inputs))
    wide = np.expand_dims(scale, axes)
    assert (np.abs(whole * wide - kernel) <= wide * 0.5001).all()
    largest = np.abs(whole).max(axes)
    assert (largest[..., 2] == 0).all() and (np.delete(largest, 2, axis=-1) == 127).all()
    if stacked:
        np.testing.assert_array_equal(quantized(kernel[1], inputs, False)[0], whole[1])


INT8 = {name: PRIORS[name] for name in ("autoregressive", "encoder", "maskgit", "maskgit, small data")}
INT8["float32"] = autoregressive({**SCANNED, "dtype": "float32"}, attention="full", order="random")
INT8["one by one"] = changed(INT8["float32"], {"scan": False})


def dequantized(tree):
    """The kernels that int8 stands for, in float32."""
    if not isinstance(tree, dict):
        return tree
    new = {name: dequantized(value) for name, value in tree.items() if name != "kernel_scale"}
    if "kernel_scale" in tree:
        new["kernel"] = tree["kernel"].astype(jnp.float32) * tree["kernel_scale"][(None,) * (
            tree["kernel"].ndim - tree["kernel_scale"].ndim
        )]  # fmt: skip
    return new


@pytest.mark.parametrize("name", INT8)
def test_an_int8_prior_is_that_of_the_rounded_kernels(name):
    """Loss and samples, one by one and in groups, by every way that decoding reads a kernel."""
    prior = changed(INT8[name], {"dtype": "float32"})
    other, weights = converted(prior, drawn(prior), "int8")
    loss = lambda prior, params: float(prior.loss(params, TEXT, TOKENS, jax.random.key(0), train=False)[0])
    rounded = dequantized(weights)
    assert loss(other, weights) == pytest.approx(loss(other, rounded), rel=1e-4)
    assert abs(loss(other, weights) - loss(prior, drawn(prior))) > 1e-4, "rounding has an effect"
    for how in [{}, {"steps": 3}] if prior.any_order else [{}]:
        draw = lambda params, how=how: np.asarray(other.sample(params, TEXT, KEYS, temperature=0.5, **how))
        np.testing.assert_array_equal(draw(weights), draw(rounded))
        assert len(np.unique(draw(weights))) > 5


@pytest.mark.parametrize("name", INT8)
def test_dtypes_and_bytes_of_int8(name):
    prior = INT8[name]
    weights = by_path(converted(prior, drawn(prior), "int8")[1])
    kernels = [path for path in weights if path.split("/")[0] in (*TRUNKS, "head") and path.endswith("/kernel")]
    assert len(kernels) >= 16 and not any("units" in path for path in weights)
    for path in kernels:
        assert weights[path].dtype == jnp.int8 and weights[f"{path}_scale"].dtype == jnp.float32
    half = prior.options.trunk.dtype == "bfloat16"
    for path in weights.keys() - set(kernels):
        assert weights[path].dtype == (jnp.bfloat16 if half and path.endswith("head_kernel") else jnp.float32), path


def test_int8_parameters_are_split_over_the_mesh():
    prior = changed(PRIORS["maskgit"], {"width": 32})
    layer = converted(prior, drawn(prior), "int8", fsdp=2)[1]["trunk"]["layer_3"]["mlp"]["up"]
    assert layer["kernel"].addressable_shards[0].data.size == layer["kernel"].size // 2
    assert layer["kernel_scale"].addressable_shards[0].data.size == layer["kernel_scale"].size


@pytest.mark.parametrize("name", ["float32", "maskgit"])
def test_a_decode_loop_holds_no_cast_copy_of_int8_kernels(name):
    """The compiled program's temporaries are smaller than one float32 copy of the kernels."""
    prior = changed(INT8[name], {"dtype": "float32", "width": 256, "depth": 4})
    other, weights = converted(prior, drawn(prior), "int8")
    draw = jax.jit(lambda params: other.sample(params, TEXT[:1], KEYS[:1]))
    kernels = sum(leaf.size for leaf in jax.tree.leaves(weights) if leaf.dtype == jnp.int8)
    assert draw.lower(weights).compile().memory_analysis().temp_size_in_bytes < 3 * kernels


def test_unknown_weights_are_rejected():
    check_weights(None)
    with pytest.raises(ConfigError, match="int4"):
        check_weights("int4")
