"""The trunk: scan and remat do not change its results, and each block option has its documented effect."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.attention.patterns import Column, Convolutional, Row, full_layers, sparse_layers
from dalle_jax.models.norm import Norm
from dalle_jax.models.rotary import rotary_angles, rotate
from dalle_jax.models.self_attention import Attention
from dalle_jax.models.transformer import MLP
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.models.trunk import Trunk, stacking, unstack
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout

LAYOUT = TokenLayout(Text(9, 3), image_vocab=9, height=3, width=4)
OPTIONS = TransformerOptions(width=16, depth=4, heads=2, dtype="float32")
PATTERNS = (Row(), Column(), Row(), Column())  # a scan of two steps with two layers each
STATES = jax.random.normal(jax.random.key(7), (2, LAYOUT.length, 16))


def trunk(**changes):
    return Trunk(dataclasses.replace(OPTIONS, **changes), LAYOUT, PATTERNS)


def made(module, *inputs):
    """Random parameters of a module: gains around one, no zeros."""
    inputs = (*inputs, False) if isinstance(module, Trunk) else inputs
    shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)))["params"]
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (around + 0.2 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def params():
    """Parameters of the scanned trunk."""
    return made(trunk(), STATES)


def loss_and_gradients(params, *, stacked=True, patterns=PATTERNS, **changes):
    module = Trunk(dataclasses.replace(OPTIONS, **changes), LAYOUT, patterns)

    def loss(params):
        used = params if stacked else unstack(params)
        out = module.apply({"params": used}, STATES, False)
        return jnp.square(out * jnp.arange(16.0).reshape(1, 1, 16)).mean(), out

    traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(params)
    (_, out), grads = traced.lower().compile()(params)
    return str(traced.jaxpr), out, grads


def assert_same(ours, expected):
    np.testing.assert_allclose(ours[1], expected[1], atol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours[2]), jax.tree.leaves(expected[2]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4, err_msg=jax.tree_util.keystr(path))


# -- scan and remat -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(params):
    """Jaxpr, output and gradients of the scanned trunk without remat."""
    return loss_and_gradients(params)


def test_scan_equals_unrolled(params, plain):
    unrolled = loss_and_gradients(params, stacked=False, scan=False)
    assert_same(unrolled, plain)
    assert "scan[" in plain[0] and "scan[" not in unrolled[0]


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_the_last_layer_of_a_scan_may_differ(params, plain, kernel):
    """The last layer's pattern is selected at run time: row, column, row, convolutional in units of two."""
    patterns = (*PATTERNS[:3], Convolutional(3))
    scanned = loss_and_gradients(params, patterns=patterns, remat="full", attention_kernel=kernel)
    unrolled = loss_and_gradients(params, patterns=patterns, stacked=False, scan=False)
    assert_same(scanned, unrolled)
    assert "scan[" in scanned[0] and "cond[" in scanned[0] and "cond[" not in plain[0]
    assert np.abs(scanned[1] - plain[1]).max() > 1e-2  # another pattern gives another result


def test_remat_equals_no_remat(params, plain):
    ours = loss_and_gradients(params, remat="full")
    assert_same(ours, plain)
    assert "remat" in ours[0] and "remat" not in plain[0]


@pytest.mark.parametrize(
    "remat, kernel",
    [*((each, "xla") for each in ("attended", "mlp", "branches", "attention", "dots")), ("dots", "splash")],
)
def test_remat_policies_do_not_change_results(params, plain, remat, kernel):
    assert_same(loss_and_gradients(params, remat=remat, attention_kernel=kernel), plain)


def test_remat_of_unrolled_layers(params, plain):
    ours = loss_and_gradients(params, stacked=False, scan=False, remat="dots")
    assert_same(ours, plain)
    assert ours[0].count("remat") >= 4


def test_stacking():
    assert stacking(sparse_layers(64)) == (4, 16)  # the convolutional layer replaces a row layer
    assert stacking(sparse_layers(8)) == (4, 2)
    assert stacking(sparse_layers(9)) == (4, 2)  # the convolutional layer is left over
    assert stacking(sparse_layers(11)) == (4, 2)
    assert stacking(full_layers(12)) == (1, 12)
    assert stacking(sparse_layers(5)) == (0, 0)
    assert stacking(full_layers(1)) == (0, 0)


def test_layout_of_the_parameters(params):
    assert set(params) == {"units", "final_norm"}
    assert params["units"]["layer_1"]["attention"]["qkv"]["kernel"].shape == (2, 16, 3, 2, 8)
    flat = unstack(params)
    assert set(flat) == {*(f"layer_{i}" for i in range(4)), "final_norm"}
    for i in range(4):  # layer 2·r + j is slice r of the unit's layer j
        np.testing.assert_array_equal(
            flat[f"layer_{i}"]["mlp"]["up"]["kernel"], params["units"][f"layer_{i % 2}"]["mlp"]["up"]["kernel"][i // 2]
        )
    assert unstack(flat) is flat
    nine = Trunk(dataclasses.replace(OPTIONS, depth=9), LAYOUT, sparse_layers(9))
    leftover = jax.eval_shape(lambda: nine.init(jax.random.key(0), STATES, False))["params"]
    assert set(leftover) == {"units", "layer_8", "final_norm"}
    assert set(leftover["units"]) == {"layer_0", "layer_1", "layer_2", "layer_3"}


def test_one_pattern_for_each_layer():
    with pytest.raises(ValueError, match="4 layers"):
        Trunk(OPTIONS, LAYOUT, PATTERNS[:3]).init(jax.random.key(0), STATES, False)


# -- block choices ------------------------------------------------------------------------------------------------


def test_layer_norm_and_rms_norm():
    x = np.random.default_rng(0).normal(2.0, 3.0, (2, 5, 16)).astype(np.float32)
    p = made(Norm("layernorm", "float32"), x)
    z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    ours = Norm("layernorm", "float32").apply({"params": p}, x)
    np.testing.assert_allclose(ours, z * p["norm"]["scale"] + p["norm"]["bias"], atol=1e-5)
    p = made(Norm("rmsnorm", "float32"), x)
    assert set(p["norm"]) == {"scale"}
    ours = Norm("rmsnorm", "float32").apply({"params": p}, x)
    np.testing.assert_allclose(ours, x / np.sqrt(np.square(x).mean(-1, keepdims=True)) * p["norm"]["scale"], atol=1e-4)


def test_norms_are_float32_inside():
    x = (30 + np.random.default_rng(0).normal(size=(1, 2, 64))).astype(np.float32)
    params = {"norm": {"scale": np.ones(64, np.float32), "bias": np.zeros(64, np.float32)}}
    ours = Norm("layernorm", "bfloat16").apply({"params": params}, x)
    assert ours.dtype == jnp.bfloat16
    z = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(ours, np.float32), z, atol=0.02)


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "geglu", "swiglu"])
def test_activations(activation):
    module = MLP(dataclasses.replace(OPTIONS, activation=activation, mlp_ratio=2.5))
    x = np.random.default_rng(0).normal(size=(1, 3, 16)).astype(np.float32)
    p = made(module, x)

    def dense(name, y):
        return y @ p[name]["kernel"] + p[name]["bias"]

    up = np.asarray(dense("up", x), np.float64)
    assert up.shape[-1] == 40
    if activation == "swiglu":
        hidden = up / (1 + np.exp(-up))
    elif activation == "gelu_tanh":
        hidden = up * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    else:  # exact, not the tanh approximation
        hidden = up * 0.5 * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
    assert ("gate" in p) == (activation in ("geglu", "swiglu"))
    if "gate" in p:
        hidden = hidden * dense("gate", x)
    np.testing.assert_allclose(module.apply({"params": p}, x), dense("down", hidden.astype(np.float32)), atol=1e-5)


def test_qk_norm_makes_scores_independent_of_the_scale_of_queries_and_keys():
    def outputs(qk_norm):
        module = Attention(dataclasses.replace(OPTIONS, qk_norm=qk_norm), LAYOUT, (Row(),))
        p = made(module, STATES)
        larger = {**p, "qkv": {"kernel": p["qkv"]["kernel"] * np.array([5, 5, 1], np.float32)[:, None, None]}}
        apply = jax.jit(lambda q: module.apply({"params": q}, STATES))
        return apply(p), apply(larger)

    np.testing.assert_allclose(*outputs(True), atol=1e-5)
    assert np.abs(np.subtract(*outputs(False))).max() > 1e-2


def test_pre_norm_block():
    """A block adds its branches to its input, so branches at zero do not change it."""
    one = Trunk(dataclasses.replace(OPTIONS, depth=1), LAYOUT, (Row(),))
    p = made(one, STATES)
    for branch, last in (("attention", "out"), ("mlp", "down")):
        p["layer_0"][branch][last] = jax.tree.map(np.zeros_like, p["layer_0"][branch][last])
    expected = Norm("layernorm", "float32").apply({"params": p["final_norm"]}, STATES)
    ours = jax.jit(lambda p: one.apply({"params": p}, STATES, False))(p)
    np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("scan, remat", [(False, "none"), (True, "full"), (True, "dots")])
def test_the_identity_path_of_a_float32_stream_is_exact(scan, remat):
    """Without branches, states and gradients pass bfloat16 layers unchanged (DALL-E, figure 4)."""
    options = dict(dtype="bfloat16", float32_logits=True, scan=scan, remat=remat)
    p = made(trunk(**options), STATES)
    for layer in p["units"].values() if scan else [p[f"layer_{i}"] for i in range(4)]:
        for branch, last in (("attention", "out"), ("mlp", "down")):
            layer[branch][last] = jax.tree.map(np.zeros_like, layer[branch][last])
    norm = lambda x: Norm("layernorm", "float32").apply({"params": p["final_norm"]}, x)
    weights = jax.random.normal(jax.random.key(3), STATES.shape)

    def states_and_gradients(states):
        return jax.jit(jax.value_and_grad(lambda x: (states(x) * weights).sum()))(STATES)

    def through(**changes):
        module = trunk(**options, **changes)
        return states_and_gradients(lambda x: module.apply({"params": p}, x.astype(module.options.stream_dtype), False))

    expected = states_and_gradients(norm)
    for ours, rounded, exact in zip(through(float32_residual=True), through(), expected):
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-6)
        assert np.abs(rounded - exact).max() > 1e-3


# -- rotary positions ---------------------------------------------------------------------------------------------


def test_rotary_scores_depend_on_the_difference_of_coordinates():
    layout = TokenLayout(Text(9, 4), 9, 5, 5)
    angles = rotary_angles(layout, 8)
    assert angles.shape == (layout.length, 4) and angles.dtype == np.float32
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    everywhere = lambda x: rotate(jnp.broadcast_to(x, (1, layout.length, 1, 8)), angles)[0, :, 0]  # noqa: E731
    scores = np.asarray(everywhere(q) @ everywhere(k).T)
    at = lambda row, column: 4 + 5 * row + column  # noqa: E731
    for dr, dc in ((0, 1), (2, 0), (1, 3), (2, -1)):
        same = [scores[at(r + dr, c + dc), at(r, c)] for r in range(5 - dr) for c in range(max(0, -dc), 5 - max(0, dc))]
        np.testing.assert_allclose(same, same[0], rtol=1e-4, atol=1e-5)
    different = [scores[at(r, c), at(0, 0)] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (0, 2))]
    assert np.diff(np.sort(different)).min() > 1e-3
    np.testing.assert_allclose(scores[3, 2], scores[1, 0], rtol=1e-4)  # text positions
    np.testing.assert_allclose(np.diag(scores), q @ k, rtol=1e-4, atol=1e-5)


def test_rotary_matters():
    """Without position embeddings, rotary attention distinguishes equal tokens by their position."""
    module = functools.partial(Attention, layout=LAYOUT, patterns=(Row(),))
    x = STATES.at[:, 5].set(STATES[:, 4])
    swapped = x.at[:, 6].set(x[:, 7]).at[:, 7].set(x[:, 6])
    moved = []
    for positions in ("learned", "rotary"):
        attention = module(dataclasses.replace(OPTIONS, positions=positions))
        p = made(attention, x)
        apply = jax.jit(lambda x, p=p, attention=attention: attention.apply({"params": p}, x))
        # Position 9 attends to 6 and 7, which differ only in their position.
        moved.append(np.abs(apply(x)[:, 9] - apply(swapped)[:, 9]).max())
    assert moved[0] < 1e-6 < 1e-3 < moved[1]


# -- numbers and options ------------------------------------------------------------------------------------------


def test_bfloat16_activations_float32_parameters():
    module = trunk(dtype="bfloat16")
    params = jax.eval_shape(lambda: nn.meta.unbox(module.init(jax.random.key(0), STATES, False)))["params"]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    x = STATES.astype(jnp.bfloat16)
    assert jax.eval_shape(lambda p: module.apply({"params": p}, x, False), params).dtype == jnp.bfloat16


def test_dropout_acts_in_training_only(params, plain):
    module = trunk(dropout=0.5)

    @functools.partial(jax.jit, static_argnums=1)
    def apply(key, train):
        return module.apply({"params": params}, STATES, train, rngs={"dropout": key})

    np.testing.assert_allclose(apply(jax.random.key(0), False), plain[1], atol=1e-5)
    assert np.abs(apply(jax.random.key(0), True) - apply(jax.random.key(1), True)).max() > 1e-2


def test_attention_dropout_acts_in_training_only_and_is_recomputed_alike(params):
    """Also where a scan selects the pattern of its last layer."""

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def run(key, train, changes):
        module = Trunk(dataclasses.replace(OPTIONS, **dict(changes)), LAYOUT, (*PATTERNS[:3], Convolutional(3)))
        loss = lambda p: jnp.square(module.apply({"params": p}, STATES, train, rngs={"dropout": key})[:, ::2]).sum()
        return jax.value_and_grad(loss)(params)

    some, one, other = (("attention_dropout", 0.4),), *jax.random.split(jax.random.key(0))
    np.testing.assert_array_equal(run(one, False, some)[0], run(one, False, ())[0])
    value, gradients = run(one, True, some)
    assert abs(value - run(other, True, some)[0]) > 1e-3 < abs(value - run(one, False, some)[0])
    again = run(one, True, (*some, ("remat", "full")))
    np.testing.assert_allclose(again[0], value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(again[1]), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-4)


def test_attention_dropout_acts_on_devices_with_the_splash_kernel(monkeypatch):
    """The kernel has no dropout, so training does without it."""
    monkeypatch.setattr("dalle_jax.models.attention.kernels.on_tpu", lambda: True)
    attention = Attention(dataclasses.replace(OPTIONS, attention_dropout=0.4), LAYOUT, (Row(),))
    p = made(attention, STATES)
    apply = jax.jit(lambda key: attention.apply({"params": p}, STATES, train=True, rngs={"dropout": key}))
    assert np.abs(apply(jax.random.key(0)) - apply(jax.random.key(1))).max() > 1e-2


@pytest.mark.parametrize(
    "changes, token",
    [
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"attention_dropout": 0.1, "attention_kernel": "splash"}, "attention_kernel"),
        ({"norm": "batchnorm"}, "batchnorm"),
        ({"activation": "relu"}, "relu"),
        ({"positions": "none"}, "positions"),
        ({"remat": "some"}, "remat"),
        ({"attention_dropout": 0.1, "attention_kernel": "cudnn"}, "attention_kernel"),
        ({"attention_kernel": "flash"}, "flash"),
        ({"attention_kernel": "cudnn"}, "float32"),
        ({"attention_kernel": "cudnn", "dtype": "bfloat16", "head_dim": 12}, "12"),
        ({"attention_kernel": "cudnn", "dtype": "bfloat16", "head_dim": 136}, "136"),
        ({"heads": 3}, "heads"),
        ({"width": 0}, "width"),
        ({"heads": 0}, "heads"),
        ({"depth": 0}, "depth"),
        ({"width": -16}, "width"),
        ({"head_dim": -1}, "head_dim"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
        ({"positions": "rotary", "head_dim": 6}, "4"),
    ],
)
def test_invalid_options(changes, token):
    with pytest.raises(ValueError, match=token):
        dataclasses.replace(OPTIONS, **changes)


def test_derived_sizes():
    assert OPTIONS.size_per_head == 8 and OPTIONS.hidden == 64
    half = dataclasses.replace(OPTIONS, dtype="bfloat16")
    assert (half.stream_dtype, half.states_dtype) == ("bfloat16", "bfloat16")
    assert dataclasses.replace(half, float32_residual=True).stream_dtype == "float32"
    assert dataclasses.replace(half, float32_logits=True).states_dtype == "float32"
    assert dataclasses.replace(OPTIONS, heads=3, head_dim=4).size_per_head == 4
