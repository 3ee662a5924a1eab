"""Patterns as windowed calls: equal to the masked reference, and cuDNN's calls for each pattern, lowered for CUDA."""

import collections
import dataclasses
import functools
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_kernel import DENSE
from jax.sharding import NamedSharding

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import on_mesh, partition_spec
from dalle_jax.errors import ConfigError
from dalle_jax.models.attention import cudnn, kernels, windows
from dalle_jax.models.attention.patterns import Bidirectional, Column, Convolutional, Full, Row
from dalle_jax.models.attention.xla import attend_reference
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.models.self_attention import Attention
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.models.trunk import Trunk
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout

PATTERNS = [Full(), Row(), Column(), *map(Convolutional, (1, 3, 5, 11)), Bidirectional(), Bidirectional(True)]
NAMES = ("batch", "length", "heads", "kv")


def layout_of(height, width, text):
    return TokenLayout(Text(9, text), image_vocab=9, height=height, width=width)


def drawn(rows, length, heads=2, size=8, count=4, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    q, *others = (jax.random.normal(key, (rows, length, heads, size)) for key in keys)
    return 3 * q, *others  # sharp softmax, so that each key matters


def with_gradients(function, cotangent, *given):
    out, back = jax.vjp(function, *given)
    return out, *back(cotangent)


# -- windows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, side, groups, spans",
    [
        (Full(), 32, 1, ((0, 1023),)),
        (Bidirectional(), 32, 1, None),
        (Row(), 32, 1, ((0, 32),)),
        (Column(), 32, 32, ((0, 31),)),
        (Column(), 4, 4, ((0, 3),)),  # and not a window for each row
        (Convolutional(11), 32, 1, ((0, 5), (27, 37), (59, 69), (91, 101), (123, 133), (155, 165))),
        (Convolutional(11), 8, 1, ((0, 45),)),  # the window is wider than a row
        (Convolutional(1), 8, 1, ((0, 0),)),
    ],
    ids=str,
)
def test_windows_of_each_pattern(pattern, side, groups, spans):
    assert windows.windows_of(pattern, layout_of(side, side, 5)) == windows.Windows(groups, spans)


@pytest.mark.parametrize("pattern", [Convolutional(3, wrap=False), Convolutional(19)], ids=str)
def test_some_patterns_have_no_windows(pattern):
    """A window that ends at the borders of the grid, and one that would need more calls than it saves."""
    assert windows.windows_of(pattern, layout_of(32, 32, 5)) is None


# -- equality -----------------------------------------------------------------------------------------------------

FEW = [Row(), Column(), Convolutional(5), Bidirectional()]
CASES = [
    (layout_of(4, 4, 3), PATTERNS),
    (layout_of(3, 5, 1).with_start_tokens(), FEW),
    (layout_of(5, 14, 4), [Column(), Convolutional(11)]),  # wider than the window
    (layout_of(1, 6, 2), FEW),
    (layout_of(5, 1, 7), FEW),
]


@pytest.mark.parametrize("layout, patterns", CASES, ids=lambda x: f"{x.height}x{x.width}" if "height" in dir(x) else "")
def test_equals_the_reference_forward_and_backward(layout, patterns):
    q, k, v, cotangent = drawn(2, layout.length)

    @jax.jit
    def both():
        results = []
        for pattern in patterns:
            ours = functools.partial(windows.attend, pattern=pattern, layout=layout, kernel=DENSE)
            reference = functools.partial(attend_reference, mask=pattern.mask(layout))
            results.append([with_gradients(f, cotangent, q, k, v) for f in (ours, reference)])
        return results

    for pattern, (ours, expected) in zip(patterns, both()):
        for name, a, b in zip(("out", "dq", "dk", "dv"), ours, expected):
            np.testing.assert_allclose(a, b, atol=3e-5, err_msg=f"{pattern} {name}")


def test_candidates_share_the_keys_of_their_caption():
    layout, captions, candidates = layout_of(4, 5, 3), 2, 3
    rows = captions * candidates
    q, k, v, cotangent = drawn(rows, layout.image_length)
    text = drawn(captions, layout.prefix_length, count=2, seed=1)
    calls = []

    def forward(*given):
        calls.append([x.shape[0] for x in given[:2]])
        return DENSE.forward(*given)

    def reference(q, k, v, text_k, text_v, mask):
        repeated = (jnp.repeat(x, candidates, axis=0) for x in (text_k, text_v))
        k, v = (jnp.concatenate(both, axis=1) for both in zip(repeated, (k, v)))
        return attend_reference(q, k, v, mask)

    @jax.jit
    def both():
        results = []
        for pattern in FEW:
            kernel = dataclasses.replace(DENSE, forward=forward)
            ours = functools.partial(windows.attend_image, pattern=pattern, layout=layout, kernel=kernel)
            image = functools.partial(reference, mask=pattern.mask(layout)[layout.prefix_length :])
            results.append([with_gradients(f, cotangent, q, k, v, *text) for f in (ours, image)])
        return results

    for pattern, (ours, expected) in zip(FEW, both()):
        for name, a, b in zip(("out", "dq", "dk", "dv", "dtk", "dtv"), ours, expected):
            np.testing.assert_allclose(a, b, atol=3e-5, err_msg=f"{pattern} {name}")
    assert calls.count([captions, captions]) == len(FEW)


@pytest.mark.parametrize("causal", [True, False])
def test_sequences_equal_the_reference(causal):
    q, k, v, cotangent = drawn(2, 7)
    mask = np.tril(np.ones((7, 7), bool)) if causal else np.ones((7, 7), bool)
    ours = functools.partial(windows.attend_sequence, causal=causal, kernel=DENSE)
    run = jax.jit(lambda f, *x: with_gradients(f, cotangent, *x), static_argnums=0)
    for a, b in zip(run(ours, q, k, v), run(lambda *x: attend_reference(*x, mask), q, k, v)):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.parametrize("rows, captions", [(8, 8), (8, 2), (3, 1)], ids=str)
def test_each_device_of_a_mesh_computes_its_rows_and_heads(rows, captions):
    """Two captions do not divide four parts of the batch, so that devices would share one."""
    layout, pattern = layout_of(3, 4, 3), Column()
    given = *drawn(rows, layout.image_length, count=3), *drawn(captions, layout.prefix_length, count=2, seed=1)
    ours = functools.partial(windows.attend_image, pattern=pattern, layout=layout, kernel=DENSE)
    run = lambda *x: jax.vjp(ours, *x)[1](jnp.ones_like(x[0]) * x[0])  # noqa: E731
    expected = jax.jit(run)(*given)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with on_mesh(mesh):
        spec = lambda x: NamedSharding(mesh, partition_spec(NAMES, x.shape, mesh, strict=False))  # noqa: E731
        found = jax.jit(run)(*(jax.device_put(x, spec(x)) for x in given))
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, atol=3e-5)


# -- cuDNN's calls ------------------------------------------------------------------------------------------------

CALL = re.compile(r'custom_call @__cudnn\$(\w+)\(.*?backend_config = "(.*?)", operand_layouts(.*?): \((.*)$')


def lowered(function, *given):
    return jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()


def calls_of(text):
    """Returns name, configuration, and layouts with types of each call."""
    found = [CALL.search(line) for line in text.splitlines() if "cudnn$" in line]
    read = lambda config: json.loads(config.replace("\\22", '"'))  # noqa: E731
    return [(match[1], read(match[2]), match[3], match[4]) for match in found]


def bfloat16(rows, length, heads=4, size=64):
    return jax.ShapeDtypeStruct((rows, length, heads, size), jnp.bfloat16)


@pytest.mark.parametrize("causal, window, keys", [(False, None, 40), (True, None, 24), (True, 5, 24)], ids=str)
def test_the_calls_are_those_of_jax(monkeypatch, causal, window, keys):
    """JAX's own attention writes the same calls: names, configurations, layouts and types."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    q, k = bfloat16(2, 24, 3, 40), bfloat16(2, keys, 3, 40)

    def ours(q, k, v, cotangent):
        out, lse = cudnn.forward(q, k, v, causal, window)
        return out, cudnn.backward(q, k, v, out, lse, cotangent, causal, window)

    def theirs(q, k, v, cotangent):
        near = None if window is None else (window - 1, 0)
        attention = functools.partial(
            jax.nn.dot_product_attention, is_causal=causal, local_window_size=near, implementation="cudnn"
        )
        out, back = jax.vjp(attention, q, k, v)
        return out, back(cotangent)

    found = [calls_of(lowered(function, q, k, k, q)) for function in (ours, theirs)]
    assert len(found[0]) == 2 and found[0] == found[1]


@pytest.mark.parametrize(
    "pattern, calls, windowed",
    [
        (Full(), 1, []),
        (Bidirectional(), 2, []),
        (Row(), 3, [33]),
        (Column(), 3, []),
        (Convolutional(11), 8, [6, 11, 11, 11, 11, 11]),
    ],
    ids=str,
)
def test_each_pattern_lowers_to_cudnn_without_scores_in_memory(pattern, calls, windowed):
    layout = layout_of(32, 32, 256)
    x = bfloat16(2, layout.length)
    attend = functools.partial(windows.attend, pattern=pattern, layout=layout, kernel=cudnn.KERNEL)
    text = lowered(lambda *x: with_gradients(attend, *x), x, x, x, x)
    found = calls_of(text)
    assert collections.Counter(name for name, *_ in found) == {"fmhaSoftmax": calls, "fmhaSoftmaxBackward": calls}
    for name in ("fmhaSoftmax", "fmhaSoftmaxBackward"):
        lengths = [call["cudnn_fmha_backend_config"]["sliding_window_length"] for n, call, *_ in found if n == name]
        assert sorted(filter(None, lengths)) == windowed
    sizes = [np.prod([int(n) for n in dims[:-1].split("x")]) for dims in re.findall(r"tensor<((?:\d+x)+)\w+>", text)]
    assert max(sizes) <= 2 * layout.length * 4 * 64  # nothing is larger than the queries


@pytest.mark.parametrize("remat, forward", [("full", 2), ("attended", 1), ("attention", 1), ("dots", 1)])
def test_remat_keeps_the_output_of_the_kernel(monkeypatch, remat, forward):
    monkeypatch.setattr(cudnn, "obstacle", lambda *_: None)
    layout = layout_of(4, 4, 8)
    trunk = Trunk(TransformerOptions(width=32, depth=2, heads=2, remat=remat, scan=False), layout, (Full(), Row()))
    x = jax.ShapeDtypeStruct((2, layout.length, 32), jnp.bfloat16)
    params = jax.eval_shape(lambda x: nn.meta.unbox(trunk.init(jax.random.key(0), x, True)), x)
    loss = lambda params, x: trunk.apply(params, x, True).astype(jnp.float32).sum()  # noqa: E731
    names = collections.Counter(name for name, *_ in calls_of(lowered(jax.grad(loss), params, x)))
    assert names == {"fmhaSoftmax": 4 * forward, "fmhaSoftmaxBackward": 4}


# -- in the models ------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The dense kernel in the place of cuDNN, for float32 on a CPU; a list with the mask of each forward call."""
    made = []

    def forward(q, k, v, causal, window):
        made.append((causal, window))
        return DENSE.forward(q, k, v, causal, window)

    monkeypatch.setattr(cudnn, "obstacle", lambda *_: None)
    monkeypatch.setattr(cudnn, "KERNEL", dataclasses.replace(DENSE, forward=forward))
    return made


OPTIONS = TransformerOptions(width=16, depth=2, heads=2, dtype="float32", positions="rotary", qk_norm=True)


def random_like(module, *inputs):
    shapes = nn.meta.unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs)))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0.5, 0.3, x.shape).astype(np.float32), shapes)


def test_a_scanned_trunk_equals_that_of_xla(calls):
    """The last layer has another pattern, which runs in XLA because it has no windows."""
    layout = layout_of(3, 4, 5)
    states = jax.random.normal(jax.random.key(7), (2, layout.length, 16))
    patterns = (Row(), Convolutional(3, wrap=False))

    def run(kernel):
        trunk = Trunk(dataclasses.replace(OPTIONS, attention_kernel=kernel, remat="dots"), layout, patterns)
        loss = lambda p, x: jnp.square(trunk.apply(p, x, False)[..., ::3]).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1)))(random_like(trunk, states, False), states)

    expected = run("xla")
    assert not calls
    for a, b in zip(jax.tree.leaves(run("auto")), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * np.abs(b).max())
    assert set(calls) == {(True, None), (False, None), (True, 5)}  # text, text's keys, row


@pytest.mark.parametrize("pattern", [Bidirectional(), Column(), Convolutional(3, wrap=False)], ids=str)
def test_drawing_with_candidates_equals_that_of_xla(calls, pattern):
    layout = layout_of(3, 4, 5)
    image = jax.random.normal(jax.random.key(3), (4, layout.image_length, 16))
    captions = jax.random.normal(jax.random.key(4), (2, layout.prefix_length, 16))

    def run(kernel):
        layer = Attention(dataclasses.replace(OPTIONS, attention_kernel=kernel), layout, (pattern,))
        params = random_like(layer, jnp.zeros((1, layout.length, 16)))

        @jax.jit
        def draw(params):
            text = layer.apply(params, captions, method="prefill")[1]
            return layer.apply(params, image, text, method="refine")

        return draw(params)

    expected = run("xla")
    assert not calls
    np.testing.assert_allclose(run("auto"), expected, atol=1e-5)
    assert bool(calls) == (pattern != Convolutional(3, wrap=False))


def test_clips_towers_equal_those_of_xla(calls):
    sizes = dict(image_size=8, patch=4, image_width=16, image_depth=1, image_heads=2, text_width=16, text_depth=1)
    sizes |= dict(text_heads=2, embed_dim=8, text_length=6, text_vocab=9, end_id=8)
    images = np.random.default_rng(0).random((2, 8, 8, 3), np.float32)
    text = np.array([[1, 2, 8, 0, 0, 0], [3, 4, 5, 6, 7, 8]], np.int32)

    def embed(kernel):
        clip = CLIP(CLIPOptions(**sizes, attention_kernel=kernel))
        params = random_like(clip.module, images, text)
        return jax.jit(clip.module.apply)(params, images, text)

    expected = embed("xla")
    assert not calls
    for a, b in zip(embed("auto"), expected):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert set(calls) == {(False, None), (True, None)}  # image, text


# -- selection ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Device:
    """A device of this process, as `jax.local_devices` lists it."""

    compute_capability: str
    platform: str = "gpu"
    device_kind: str = "a GPU"


@pytest.mark.parametrize(
    "platform, capability, dtype, head, expected",
    [
        ("cpu", "", "bfloat16", 64, "cpu"),
        ("tpu", "", "bfloat16", 64, "tpu"),
        ("gpu", "9.0", "bfloat16", 64, None),
        ("gpu", "8.0", "bfloat16", 128, None),
        ("gpu", "7.5", "bfloat16", 64, "8.0"),
        ("gpu", "gfx942", "bfloat16", 64, "8.0"),  # AMD
        ("gpu", "9.0", "float32", 64, "float32"),
        ("gpu", "9.0", "bfloat16", 48, None),
        ("gpu", "9.0", "bfloat16", 44, "44"),
        ("gpu", "9.0", "bfloat16", 256, "256"),
    ],
)
def test_where_cudnn_runs(monkeypatch, platform, capability, dtype, head, expected):
    monkeypatch.setattr(cudnn, "platform", lambda: platform)
    monkeypatch.setattr(kernels, "on_tpu", lambda: platform == "tpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(capability)])
    other = "splash" if platform == "tpu" else "xla"
    assert kernels.chosen("auto", dtype, head, "model.trunk") == ("cudnn" if expected is None else other)
    assert kernels.chosen("xla", dtype, head, "model.trunk") == "xla"
    if expected is None:
        assert kernels.chosen("cudnn", dtype, head, "model.trunk") == "cudnn"
    else:
        with pytest.raises(ConfigError, match=expected):
            kernels.chosen("cudnn", dtype, head, "model.trunk")


def test_a_stored_kernel_of_a_gpu_becomes_auto_on_other_devices():
    trunk = {"width": 64, "attention_kernel": "cudnn"}
    prior, clip = {"trunk": trunk, "kernel": 3}, {"attention_kernel": "cudnn", "dtype": "bfloat16"}
    assert kernels.on_any_device(prior) == {"trunk": trunk | {"attention_kernel": "auto"}, "kernel": 3}
    assert kernels.on_any_device(clip) == {"attention_kernel": "auto", "dtype": "bfloat16"}
    for other in ("xla", "splash"):
        assert kernels.on_any_device({"trunk": {"attention_kernel": other}}) == {"trunk": {"attention_kernel": other}}
    assert trunk["attention_kernel"] == "cudnn"


def test_clip_says_that_cudnn_needs_bfloat16():
    with pytest.raises(ConfigError, match="model.attention_kernel=auto"):
        CLIPOptions(attention_kernel="cudnn")
