"""Cross-attention and the norms of NormFormer, against plain NumPy."""

import math

import jax
import numpy as np
import pytest
from flax import linen as nn

from dalle_jax.models.attention.patterns import Full
from dalle_jax.models.cross_attention import CrossAttention, Memory
from dalle_jax.models.transformer import Block
from dalle_jax.models.transformer_options import NORM_PLACEMENTS, TransformerOptions
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout

LAYOUT = TokenLayout(Text(9, 5), image_vocab=9, height=2, width=2).with_encoder()
C, M, S, D = 2, 5, LAYOUT.length, 16
RANDOM = np.random.default_rng(3)
STREAM = RANDOM.normal(size=(C, S, D)).astype(np.float32)
STATES = RANDOM.normal(size=(C, M, D)).astype(np.float32)
VISIBLE = np.arange(M)[None] < np.array([[3], [5]])


def options_of(**changes):
    return TransformerOptions(**{"width": D, "depth": 1, "heads": 2, "dtype": "float32", "mlp_ratio": 1.5, **changes})


def made(module, *inputs):
    """Random parameters of a module: gains around one, no zeros."""
    shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)))["params"]
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (around + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


# -- plain NumPy --------------------------------------------------------------------------------------------------


def normed(x, params):
    params = params["norm"]
    if "bias" not in params:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * params["scale"]
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return z * params["scale"] + params["bias"]


def attend(q, k, v, mask, out):
    """Loops over rows and heads. q is [B, P, H, K], k and v are [B, L, H, K], mask is [B, P, L]."""
    heads = np.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = np.where(mask[b], q[b, :, h] @ k[b, :, h].T / np.sqrt(q.shape[-1]), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h]
    return np.einsum("bphk,hkd->bpd", heads, out["kernel"]) + out["bias"]


def project(x, params, axis=None):
    kernel, bias = params["kernel"], params.get("bias", 0.0)
    if axis is not None:
        kernel, bias = kernel[:, axis], bias[axis] if "bias" in params else 0.0
    return np.einsum("bpd,dhk->bphk", x, kernel) + bias


def plain_cross(x, states, params, visible):
    q, k, v = project(x, params["q"]), project(states, params["kv"], 0), project(states, params["kv"], 1)
    if "q_norm" in params:
        q, k = normed(q, params["q_norm"]), normed(k, params["k_norm"])
    return attend(q, k, v, np.broadcast_to(visible[:, None], (len(x), x.shape[1], states.shape[1])), params["out"])


def plain_self(x, params):
    q, k, v = (project(x, params["qkv"], axis) for axis in range(3))
    return attend(q, k, v, np.broadcast_to(np.tri(S, dtype=bool), (len(x), S, S)), params["out"])


def plain_mlp(x, params):
    dense = lambda x, name: x @ params[name]["kernel"] + params[name]["bias"]
    up = dense(x, "up")
    hidden = up * 0.5 * (1 + np.vectorize(math.erf)(up / np.sqrt(2)))
    hidden = hidden * dense(x, "gate")
    if "hidden_norm" in params:
        hidden = normed(hidden, params["hidden_norm"])
    return dense(hidden, "down")


def plain_block(x, params, placement):
    norm = lambda x, name: normed(x, params[name])
    branches = {
        "attention": lambda x: plain_self(x, params["attention"]),
        "cross": lambda x: plain_cross(x, STATES, params["cross_attention"], VISIBLE),
        "mlp": lambda x: plain_mlp(x, params["mlp"]),
    }
    for name, branch in branches.items():
        if placement == "post":
            x = norm(x + branch(x), f"{name}_norm")
            continue
        y = branch(norm(x, f"{name}_norm"))
        if placement == "sandwich" or (placement == "normformer" and name != "mlp"):
            y = norm(y, f"{name}_out_norm")
        x = x + y
    return x


# -- comparisons --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"head_dim": 3}])
def test_cross_attention(changes):
    module = CrossAttention(options_of(**changes))
    read = lambda m, x, states, visible: m(x, m.read(Memory(states, visible)))
    whole = lambda *inputs: module.apply({"params": params}, *inputs, method=read)
    shapes = nn.meta.unbox(
        jax.eval_shape(lambda: module.init(jax.random.key(0), STREAM, STATES, VISIBLE, method=read))
    )["params"]
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    found = jax.jit(whole)(STREAM, STATES, VISIBLE)
    np.testing.assert_allclose(found, plain_cross(STREAM, STATES, params, VISIBLE), atol=2e-4)
    everywhere = jax.jit(whole, static_argnums=2)(STREAM, STATES, None)
    np.testing.assert_allclose(everywhere, plain_cross(STREAM, STATES, params, VISIBLE | True), atol=2e-4)
    assert np.abs(everywhere - found)[0].max() > 1e-2, "the first row has hidden positions"
    # Candidates of a caption are adjacent rows, and one position of each is read without its axis.
    candidates = np.repeat(STREAM, 3, axis=0) + 0.1 * np.arange(6, dtype=np.float32).reshape(6, 1, 1)
    np.testing.assert_allclose(
        jax.jit(whole)(candidates, STATES, VISIBLE),
        plain_cross(candidates, np.repeat(STATES, 3, axis=0), params, np.repeat(VISIBLE, 3, axis=0)),
        atol=2e-4,
    )
    step = lambda m, x, states, visible: m(x, m.read(Memory(states, visible)), decode_step=True)
    one = jax.jit(lambda x: module.apply({"params": params}, x, STATES, VISIBLE, method=step))(candidates[:, 2])
    np.testing.assert_allclose(one, whole(candidates, STATES, VISIBLE)[:, 2], atol=2e-4)


@pytest.mark.parametrize("placement", NORM_PLACEMENTS)
def test_a_block_with_cross_attention(placement):
    block = Block(options_of(norm_placement=placement, activation="geglu"), LAYOUT, (Full(),), cross=True)
    run = lambda params: block.apply({"params": params}, STREAM, False, memory=Memory(STATES, VISIBLE))
    params = made(block, STREAM, False, None, None, None, None, Memory(STATES, VISIBLE))
    np.testing.assert_allclose(jax.jit(run)(params), plain_block(STREAM, params, placement), atol=2e-4)
    names = {f"{branch}_out_norm" for branch in ("attention", "cross", "mlp")}
    expected = {"sandwich": names, "normformer": names - {"mlp_out_norm"}}.get(placement, set())
    assert names & params.keys() == expected
    assert ("hidden_norm" in params["mlp"]) == (placement == "normformer")
