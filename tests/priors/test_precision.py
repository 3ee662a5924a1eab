"""The residual stream and the logits in float32 lower the errors of bfloat16 products, as they claim."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prior_cases import N, autoregressive, cached_logits, changed, drawn, maskgit, rows

from dalle_jax.priors.embedding import project

DEEP = autoregressive({"width": 32, "depth": 64, "scan": True})
PRIORS = {
    "autoregressive": autoregressive(),
    "any order, start tokens": autoregressive(attention="full", order="random", start_tokens=True),
    "maskgit": maskgit(head="linear"),
    "maskgit, mlm": maskgit(),
}
TEXT, TOKENS = rows(2)
BFLOAT16 = {"dtype": "bfloat16"}
STREAM = {"dtype": "bfloat16", "float32_residual": True}
BOTH = {"dtype": "bfloat16", "float32_residual": True, "float32_logits": True}


def embedded(model):
    """Embeddings of a batch."""
    if hasattr(model, "embed"):
        cells = jnp.tile(jnp.arange(N)[None], (2, 1)) if model.options.order == "random" else None
        return model.embed(TEXT, TOKENS, cells=cells)
    return jnp.concatenate([model.embedding.text(TEXT), model.embedding.image(TOKENS)], axis=1)


def states(model):
    """States of a model's trunk from a batch."""
    return model.trunk(embedded(model), False)


def error(found, exact):
    """Relative error of an array."""
    return np.linalg.norm(np.subtract(found, exact, dtype=np.float64)) / np.linalg.norm(exact)


# -- the residual stream ------------------------------------------------------------------------------------------


def test_a_float32_residual_stream_reduces_the_errors_of_states_and_gradients():
    """64 layers in bfloat16 against the same layers in float32: about half of the error; 0.52 on one processor."""
    params = nn.meta.unbox(jax.jit(DEEP.init)(jax.random.key(0)))

    def states_and_gradients(how):
        def projected(params):
            x = changed(DEEP, how).model.apply({"params": params}, method=states).astype(jnp.float32)
            return (x * jax.random.normal(jax.random.key(1), x.shape)).sum(), x

        grads, x = jax.jit(jax.grad(projected, has_aux=True))(params)
        return np.asarray(x), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])

    exact, plain, stream = (states_and_gradients(how) for how in ({}, BFLOAT16, STREAM))
    for with_option, without, expected in zip(stream, plain, exact):
        assert 1e-4 < error(with_option, expected) < 0.6 * error(without, expected)


def without_branches(prior):
    """Random parameters of a prior whose layers add nothing to the stream."""
    params = jax.tree.map(np.copy, drawn(prior))
    for name, layer in params["trunk"].items():
        for branch, last in (("attention", "out"), ("mlp", "down")) if name.startswith("layer") else ():
            layer[branch][last] = jax.tree.map(np.zeros_like, layer[branch][last])
    return params


@pytest.mark.parametrize("name", ["autoregressive", "any order, start tokens", "maskgit"])
def test_training_and_decoding_pass_the_stream_unchanged(name):
    """Without branches, bfloat16 layers change no bit of the stream on the way to the logits, and no gradient."""
    prior = PRIORS[name]
    params = without_branches(prior)

    def logits(how):
        def full(params):
            image = changed(prior, how).model.apply({"params": params}, TEXT, TOKENS)
            image = image if prior.name == "maskgit" else image[1]
            return (image * jnp.cos(jnp.arange(image.size).reshape(image.shape))).sum(), image

        (_, image), grads = jax.jit(jax.value_and_grad(full, has_aux=True))(params)
        if prior.name == "maskgit":
            refined = lambda model: model.refine(TOKENS, model.prefill(TEXT))
            decoded = jax.jit(lambda p: changed(prior, how).model.apply({"params": p}, method=refined))(params)
        else:
            decoded = cached_logits(changed(prior, how), params, TEXT, TOKENS)
        return image, decoded, grads["embedding"]["image"]

    exact, both, plain = (logits(how) for how in ({}, BOTH, BFLOAT16))
    for ours, rounded, expected in zip(both, plain, exact):
        assert error(ours, expected) < 1e-5 < 5e-4 < error(rounded, expected)


# -- logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode_step", [False, True])
def test_exact_logits_have_no_rounded_factor(decode_step):
    """They equal a float64 product to float32 precision, and compilers may not round their factors."""
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(8, 64)).astype(np.float32), rng.normal(size=(32, 64)).astype(np.float32)
    call = lambda x, exact: project(jnp.asarray(x), jnp.asarray(table), decode_step=decode_step, exact=exact)
    assert error(call(x, True), x.astype(np.float64) @ table.T) < 1e-6
    half = jnp.asarray(x, jnp.bfloat16)
    expected = np.asarray(half, np.float64) @ table.T  # the states are bfloat16 numbers, the table is not
    assert error(call(half, True), expected) < 1e-6 < 1e-3 < error(call(half, False), expected)
    assert call(half, False).dtype == call(half, True).dtype == jnp.float32
    with jax.default_matmul_precision("default"):  # the tests' own is the highest
        program = lambda exact: str(jax.make_jaxpr(lambda x: call(x, exact))(x))
        assert "HIGHEST" in program(True) and "HIGHEST" not in program(False)


@pytest.mark.parametrize("name", PRIORS)
def test_dtypes_of_stream_states_and_heads(name):
    prior = PRIORS[name]
    params = jax.eval_shape(lambda: nn.meta.unbox(prior.init(jax.random.key(0))))
    shape = lambda how, method: jax.eval_shape(
        lambda p: changed(prior, how).model.apply({"params": p}, method=method), params
    )
    for how, stream, heads in ((BFLOAT16, "bfloat16", "bfloat16"), (STREAM, "float32", "bfloat16")):
        assert (shape(how, embedded).dtype, shape(how, states).dtype) == (stream, heads)
    assert (shape(BOTH, embedded).dtype, shape(BOTH, states).dtype) == (jnp.float32, jnp.float32)
    loss = lambda how: str(
        jax.make_jaxpr(lambda p: changed(prior, how).loss(p, TEXT, TOKENS, jax.random.key(0), train=False)[0])(params)
    )
    with jax.default_matmul_precision("default"):
        assert "HIGHEST" in loss(BOTH) and "HIGHEST" not in loss(STREAM)
