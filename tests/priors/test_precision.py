"""The residual stream and the logits in float32: both lower the errors of bfloat16 products, as they claim."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prior_cases import N, autoregressive, cached_logits, changed, maskgit, rows

from dalle_jax.priors.embedding import project

DEEP = {"width": 32, "depth": 64, "scan": True}
PRIORS = {
    "autoregressive": autoregressive(DEEP),
    "any order": autoregressive(DEEP, attention="full", order="random", start_tokens=True),
    "maskgit": maskgit(DEEP),
}
TEXT, TOKENS = rows(2)
BFLOAT16 = {"dtype": "bfloat16"}
STREAM = {"dtype": "bfloat16", "float32_residual": True}
LOGITS = {"dtype": "bfloat16", "float32_residual": True, "float32_logits": True}


def fresh(prior):
    return nn.meta.unbox(jax.jit(prior.init)(jax.random.key(0)))


def states_of(model):
    """States of a model's trunk from a batch."""
    if hasattr(model, "embed"):
        cells = jnp.tile(jnp.arange(N)[None], (2, 1)) if model.options.order == "random" else None
        return model.trunk(model.embed(TEXT, TOKENS, cells=cells), False)
    return model.trunk(jnp.concatenate([model.embedding.text(TEXT), model.embedding.image(TOKENS)], axis=1), False)


def states_and_gradients(prior, params):
    """States, and gradients of a random sum of them, each as one float64 vector."""

    def projected(params):
        x = prior.model.apply({"params": params}, method=states_of).astype(jnp.float32)
        return (x * jax.random.normal(jax.random.key(1), x.shape)).sum(), x

    grads, x = jax.jit(jax.grad(projected, has_aux=True))(params)
    flat = lambda tree: np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
    return flat(x), flat(grads)


def errors(found, exact):
    """Relative errors of several arrays."""
    return [np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(b) for a, b in zip(found, exact, strict=True)]


def assert_half(found, plain):
    """Each error is real, and less than half of the error without the option."""
    assert all(1e-6 < a < b / 2 for a, b in zip(found, plain, strict=True)), (found, plain)


# -- the residual stream ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRIORS)
def test_a_float32_residual_stream_halves_the_errors_of_states_and_gradients(name):
    prior = PRIORS[name]
    params = fresh(prior)
    exact = states_and_gradients(prior, params)
    plain = errors(states_and_gradients(changed(prior, BFLOAT16), params), exact)
    assert_half(errors(states_and_gradients(changed(prior, STREAM), params), exact), plain)


def test_every_remat_policy_and_no_scan_keep_the_stream():
    prior = changed(PRIORS["autoregressive"], {"depth": 16})
    params = fresh(prior)
    exact = states_and_gradients(prior, params)
    plain = errors(states_and_gradients(changed(prior, BFLOAT16), params), exact)
    for remat in ("full", "attended", "attention", "dots"):
        found = errors(states_and_gradients(changed(prior, {**STREAM, "remat": remat}), params), exact)
        assert all(a < b * 0.7 for a, b in zip(found, plain)), (remat, found, plain)


def decoded(name, how):
    """Logits of decoding: from the caches of the autoregressive prior, or of MaskGIT's refinement."""
    prior = changed(PRIORS[name], {"depth": 12, **how})
    params = fresh(changed(prior, {"scan": False}))
    if name == "maskgit":
        model = changed(prior, {"scan": False}).model
        refined = lambda model: model.refine(TOKENS, model.prefill(TEXT))
        return jax.jit(lambda p: model.apply({"params": p}, method=refined))(params)
    return cached_logits(changed(prior, {"scan": False}), params, TEXT, TOKENS)


@pytest.mark.parametrize("name", ["autoregressive", "maskgit"])
def test_decoding_has_the_stream_and_the_logits_of_training(name):
    """The logits of decoding come nearer to those of float32 with each option."""
    exact = decoded(name, {})
    plain, stream, logits = (errors([decoded(name, how)], [exact])[0] for how in (BFLOAT16, STREAM, LOGITS))
    assert logits < 0.9 * stream and stream < 0.9 * plain, (plain, stream, logits)


# -- logits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode_step", [False, True])
def test_exact_logits_have_no_rounded_factor(decode_step):
    """They equal a float64 product to float32 precision, and compilers may not round their factors."""
    rng = np.random.default_rng(0)
    x, table = rng.normal(size=(8, 64)).astype(np.float32), rng.normal(size=(32, 64)).astype(np.float32)
    expected = x.astype(np.float64) @ table.T.astype(np.float64)
    call = lambda x, exact: project(x, table, decode_step=decode_step, exact=exact)
    assert errors([call(x, True)], [expected])[0] < 1e-6
    half = jnp.asarray(x, jnp.bfloat16)
    rounded = np.asarray(half, np.float64) @ table.T.astype(np.float64)  # the states are bfloat16, the table is not
    assert errors([call(half, True)], [rounded])[0] < 1e-6 < 1e-3 < errors([call(half, False)], [rounded])[0]
    assert call(half, False).dtype == call(half, True).dtype == jnp.float32
    program = lambda exact: str(jax.make_jaxpr(lambda x: call(x, exact))(x))
    assert "HIGHEST" in program(True) and "HIGHEST" not in program(False)


@pytest.mark.parametrize("name", PRIORS)
def test_the_heads_read_float32_states(name):
    """With both options the states that the heads read are float32 numbers, not rounded ones."""
    prior = changed(PRIORS[name], {"depth": 4})
    params = fresh(prior)
    for how, dtype in ((STREAM, jnp.bfloat16), (LOGITS, jnp.float32)):
        model = changed(prior, how).model
        assert jax.eval_shape(lambda p, m=model: m.apply({"params": p}, method=states_of), params).dtype == dtype
    loss = lambda how: changed(prior, how).loss(params, TEXT, TOKENS, jax.random.key(0), train=False)[0]
    program = str(jax.make_jaxpr(lambda: loss(LOGITS))())
    heads = 1 if name == "maskgit" else 2  # the image's, and the text's
    assert program.count("Precision.HIGHEST, Precision.HIGHEST") == heads
