"""Parameters that are converted once for drawing: fewer bytes, the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from prior_cases import autoregressive, changed, drawn, maskgit, params_of, rows

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.priors.decoding_weights import for_drawing
from dalle_jax.pytree import by_path

SCANNED = {"dtype": "bfloat16", "depth": 4, "scan": True, "remat": "full", "norm": "rmsnorm", "qk_norm": True}
PRIORS = {
    "autoregressive": autoregressive(SCANNED),
    "any order": autoregressive(SCANNED, attention="full", order="random", tied_embeddings=True),
    "maskgit": maskgit(SCANNED),
    "maskgit, small data": maskgit(SCANNED, head="linear", tied_embeddings=False, neighbour_kernel=3),
    "float32 logits": maskgit({**SCANNED, "float32_logits": True}, tied_embeddings=False),
}
TEXT, TOKENS = rows(2)
KEYS = jax.random.split(jax.random.key(5), 4)


def converted(prior, params, **mesh):
    return for_drawing(prior, jax.tree.map(jnp.asarray, params), make_mesh(**{"data": 1, **mesh}))


@pytest.mark.parametrize("name", PRIORS)
def test_a_converted_prior_draws_the_same_tokens(name):
    prior = PRIORS[name]
    params = drawn(prior)
    other, weights = converted(prior, params)
    assert not other.options.trunk.scan and set(weights["trunk"]) == {*(f"layer_{i}" for i in range(4)), "final_norm"}
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
        kernel = path.split("/")[0] in ("trunk", "head") and path.endswith("/kernel")
        half = kernel or (untied and not prior.options.trunk.float32_logits)
        assert leaf.dtype == (jnp.bfloat16 if half else jnp.float32), path
    halves = sum(leaf.size for leaf in weights.values() if leaf.dtype == jnp.bfloat16)
    size = sum(leaf.size for leaf in jax.tree.leaves(drawn(prior)))
    assert sum(leaf.nbytes for leaf in weights.values()) == 4 * size - 2 * halves and halves > size / 2


def test_a_float32_prior_stays_as_it_is():
    prior = maskgit({"scan": True})
    params = params_of(prior)
    assert for_drawing(prior, params, make_mesh(data=1)) == (prior, params)


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
