"""Splash attention: equality with the reference (interpreted), selection by platform, and compilation for TPUs."""

import dataclasses
import functools
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from abstract_meshes import mesh_of
from jax.sharding import NamedSharding

from dalle_jax import compilation_cache
from dalle_jax.aot import topologies
from dalle_jax.aot.program import Program
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import RULES, abstract, batch_sharding, on_mesh, partition_spec, shardings_of
from dalle_jax.models.attention import splash
from dalle_jax.models.attention.patterns import Bidirectional, Column, Convolutional, Full, Row, Toroidal
from dalle_jax.models.attention.xla import attend_reference
from dalle_jax.models.self_attention import Attention
from dalle_jax.models.transformer_options import REMAT, TransformerOptions
from dalle_jax.models.trunk import Trunk
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout

PATTERNS = [Full(), Row(), Column(), Convolutional(5), Convolutional(3, wrap=False), Toroidal(3)]
PATTERNS += [Bidirectional(), Bidirectional(text_reads_image=True)]
every_pattern = pytest.mark.parametrize("pattern", PATTERNS, ids=str)
PAPER = TokenLayout(Text(16_384, 256), image_vocab=8192, height=32, width=32)
HEADS = ("batch", "length", "heads", "kv")


def layout_of(text, height, width):
    return TokenLayout(Text(9, text), image_vocab=9, height=height, width=width)


# S = 23 is less than one block, 256 is two whole blocks, and 391 has seven positions in the fourth block.
LAYOUTS = [layout_of(3, 4, 5), layout_of(64, 16, 12), layout_of(7, 16, 24)]
CASES = [(p, layout) for layout in (LAYOUTS[0], LAYOUTS[2]) for p in PATTERNS] + [(Row(), LAYOUTS[1])]


@pytest.fixture
def small_blocks(monkeypatch):
    """Uses blocks of 128, so that some of them are empty."""
    monkeypatch.setitem(splash.SCHEDULES, "v5p", {128: splash.SCHEDULES["v5p"][128]})
    for cached in (splash.order, splash._kernel):
        cached.cache_clear()
    yield
    for cached in (splash.order, splash._kernel):
        cached.cache_clear()


def drawn(layout, rows=2, heads=2, size=8, dtype="float32"):
    """Draws queries, keys, values and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, *others = (jax.random.normal(key, (rows, layout.length, heads, size), dtype) for key in keys)
    return 3 * q, *others  # sharp softmax, so that each key matters


def in_stream_order(q, k, v, pattern, layout):
    """Runs `splash.attend` on a stream in raster order."""
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    there = lambda x: splash.ordered(flat(x), pattern, layout).reshape(x.shape)
    out = splash.attend(there(q), there(k), there(v), pattern, layout)
    return splash.restored(flat(out), pattern, layout).reshape(out.shape)


def with_gradients(function, q, k, v, cotangent):
    out, back = jax.vjp(function, q, k, v)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *back(cotangent))))


def assert_close(ours, expected, **tolerance):
    for name, a in ours.items():
        b = expected[name]
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), err_msg=name, **tolerance)


# -- equality -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern, layout", CASES, ids=lambda x: str(getattr(x, "length", x)))
def test_equals_the_reference_forward_and_backward(small_blocks, pattern, layout):
    given = drawn(layout)
    ours = jax.jit(lambda *x: with_gradients(lambda *y: in_stream_order(*y, pattern, layout), *x))(*given)
    mask = pattern.mask(layout)
    expected = jax.jit(lambda *x: with_gradients(lambda *y: attend_reference(*y, mask), *x))(*given)
    assert_close(ours, expected, atol=5e-5)


@pytest.mark.parametrize("pattern", [Bidirectional(), Column()], ids=str)
def test_bfloat16(small_blocks, pattern):
    """The error is that of 8 bits, because scores and weights are float32."""
    layout = LAYOUTS[2]
    given = drawn(layout, size=64, dtype="bfloat16")
    ours = jax.jit(lambda *x: with_gradients(lambda *y: in_stream_order(*y, pattern, layout), *x))(*given)
    assert {x.dtype for x in ours.values()} == {jnp.dtype("bfloat16")}
    exact, mask = [x.astype(jnp.float32) for x in given], pattern.mask(layout)
    expected = jax.jit(lambda *x: with_gradients(lambda *y: attend_reference(*y, mask), *x))(*exact)
    for name, b in expected.items():
        error = np.abs(np.asarray(ours[name], np.float32) - b)
        assert error.max() < 0.02 * np.abs(b).max() and error.mean() < 0.005 * np.abs(b).max(), name


def test_queries_of_the_image_alone(small_blocks):
    layout, pattern = LAYOUTS[2], Column()
    t = layout.prefix_length
    q, k, v, cotangent = drawn(layout)
    given = q[:, t:], k, v, cotangent[:, t:]

    mask = pattern.mask(layout)[t:]
    expected = jax.jit(lambda *x: with_gradients(lambda *y: attend_reference(*y, mask), *x))(*given)
    ours = jax.jit(lambda *x: with_gradients(lambda *y: in_stream_order(*y, pattern, layout), *x))(*given)
    assert_close(ours, expected, atol=5e-5)


def test_the_output_is_kept_without_padding(small_blocks):
    """391 positions are four blocks of 128. Rows of 8 would be padded to 128 in a TPU's memory."""
    layout, policy = LAYOUTS[2], REMAT["attended"]
    q, k, v, _ = drawn(layout)
    attend = lambda *qkv: splash.attend(*qkv, Row(), layout)
    _, pullback = jax.vjp(jax.checkpoint(attend, policy=policy), q, k, v)
    kept = [x.shape for x in jax.tree.leaves(pullback)]
    assert (2, 391, 2 * 8) in kept and (2 * 2, 512) in kept  # the output; the log-sum-exp, one number a query
    assert not [shape for shape in kept if shape[-2:] == (512, 8)]


@pytest.mark.parametrize("rows, heads", [(8, 4), (3, 3)], ids=["divided", "nothing to divide"])
def test_each_device_of_a_mesh_computes_its_rows_and_heads(small_blocks, rows, heads):
    layout, pattern = LAYOUTS[0], Column()
    given = drawn(layout, rows, heads)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    spec = partition_spec(HEADS, given[0].shape, mesh, strict=False)

    @jax.jit
    def step(*x):
        return with_gradients(lambda *y: in_stream_order(*y, pattern, layout), *x)

    with on_mesh(mesh):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in given]
        ours, traced = step(*placed), str(jax.make_jaxpr(step)(*placed))
    mask = pattern.mask(layout)
    expected = jax.jit(lambda *x: with_gradients(lambda *y: attend_reference(*y, mask), *x))(*given)
    assert_close(ours, expected, atol=5e-5)
    for x in ours.values():
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)
    local = (rows // 4) * (heads // 2) if rows == 8 else rows * heads
    assert f"f32[{local},128,8] = pallas_call" in traced or f":f32[{local},128,8]" in traced


# -- blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, filled",
    [(Full(), 15), (Bidirectional(), 21), (Row(), 12), (Column(), 15), (Convolutional(11), 12)],
    ids=str,
)
def test_blocks_at_the_papers_size(pattern, filled):
    """Counts the filled blocks among 25 of 256. Four blocks of 640 cost less, because large blocks are cheaper."""
    mask = splash.kernel_mask(pattern, PAPER, PAPER.length)
    assert splash.filled_blocks(mask, 256).sum() == filled
    assert splash.block_size(mask) == 640
    assert splash.filled_blocks(mask, 640).sum() == (4 if pattern == Bidirectional() else 3)


def test_columns_are_sorted_if_that_saves_blocks():
    """In raster order a column layer is as dense as a causal one, which costs more at 48x48 tokens."""
    large = layout_of(256, 48, 48)
    places = splash.order(Column(), large)
    np.testing.assert_array_equal(places[256 : 256 + 48], 256 + 48 * np.arange(48))
    raster, together = Column().mask(large), splash.kernel_mask(Column(), large, large.length)
    cost = lambda mask: splash.cycles(mask, splash.block_size(mask))
    assert cost(raster) > 1.2 * cost(together)
    x = jnp.arange(large.length, dtype=jnp.float32).reshape(1, -1, 1)
    moved = splash.ordered(x, Column(), large)
    np.testing.assert_array_equal(moved[0, :, 0], places)
    np.testing.assert_array_equal(splash.restored(moved, Column(), large), x)
    for pattern, layout in ((Row(), large), (Column(), PAPER)):
        np.testing.assert_array_equal(splash.order(pattern, layout), np.arange(layout.length))


@every_pattern
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: str(layout.length))
def test_padding_is_masked_and_needs_no_blocks(small_blocks, pattern, layout):
    s, order = layout.length, splash.order(pattern, layout)
    given = splash.kernel_mask(pattern, layout, s)
    np.testing.assert_array_equal(given, pattern.mask(layout)[order][:, order])
    mask = splash.whole_blocks(given, 128)
    assert mask.shape == (-(-s // 128) * 128,) * 2
    assert not mask[:, s:].any() and mask.any(axis=1).all()
    np.testing.assert_array_equal(mask[:s, :s], given)
    without = np.pad(given, ((0, mask.shape[0] - s),) * 2)
    np.testing.assert_array_equal(splash.filled_blocks(given, 128), splash.filled_blocks(without, 128))
    assert (np.diff(order) != 1).any() == (pattern == Column() and s > 256)


# -- in the trunk -------------------------------------------------------------------------------------------------

OPTIONS = TransformerOptions(width=16, depth=4, heads=2, dtype="float32", positions="rotary", qk_norm=True)
LAYOUT = layout_of(5, 5, 6)
STATES = jax.random.normal(jax.random.key(7), (2, LAYOUT.length, 16))


def parameters(module, *inputs):
    made = nn.meta.unbox(jax.jit(functools.partial(module.init, jax.random.key(0)), static_argnums=1)(*inputs))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), made)


def test_a_splash_trunk_equals_an_xla_trunk():
    patterns = (Row(), Column(), Row(), Column())  # a scan of two steps

    def run(kernel, **changes):
        trunk = Trunk(dataclasses.replace(OPTIONS, attention_kernel=kernel, **changes), LAYOUT, patterns)
        weights = jnp.arange(16.0).reshape(1, 1, 16)
        loss = lambda p, x: jnp.square(trunk.apply(p, x, False) * weights).mean()
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    params = parameters(Trunk(OPTIONS, LAYOUT, patterns), STATES, False)
    expected = run("xla")(params, STATES)
    ours = run("splash", remat="full")(params, STATES)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("pattern", [Bidirectional(), Column()], ids=str)
def test_a_splash_layer_equals_an_xla_layer(small_blocks, pattern):
    """Both agree on the whole stream, and on all image positions given cached text with two candidates per caption.

    Columns are sorted, so the rotary angles must be sorted too.
    """
    layout, t = LAYOUTS[2], LAYOUTS[2].prefix_length
    attention = lambda kernel: Attention(dataclasses.replace(OPTIONS, attention_kernel=kernel), layout, (pattern,))
    x = jax.random.normal(jax.random.key(7), (2, layout.length, 16))
    image = jax.random.normal(jax.random.key(3), (4, layout.image_length, 16))
    params = parameters(attention("xla"), x)
    text = attention("xla").apply(params, x[:, :t], method="prefill")[1]
    assert (np.diff(splash.order(pattern, layout)) != 1).any() == (pattern == Column())

    def run(kernel):
        layer = attention(kernel)
        both = lambda params: (layer.apply(params, x), layer.apply(params, image, text, method="refine"))
        return jax.jit(both)(params)

    for a, b in zip(run("splash"), run("xla")):
        np.testing.assert_allclose(a, b, atol=2e-5)


# -- selection ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["auto", "xla", "splash"])
@pytest.mark.parametrize(
    "device",
    [None, ("cpu", "cpu"), ("NVIDIA H100 80GB HBM3", "gpu"), ("TPU v5", "tpu"), ("TPU v6 lite", "tpu")],
    ids=str,
)
def test_the_meshs_platform_decides(kernel, device):
    """This process has only CPUs. The kernel is selected by the mesh that the computation is traced for."""
    attention = Attention(dataclasses.replace(OPTIONS, attention_kernel=kernel), LAYOUT, (Row(),))
    params = jax.eval_shape(functools.partial(attention.init, jax.random.key(0)), STATES)
    run = jax.make_jaxpr(lambda x: attention.apply(nn.meta.unbox(params_of(params)), x))
    if device is None:
        traced = str(run(STATES))
    else:
        with jax.sharding.use_abstract_mesh(mesh_of(*device)), nn.logical_axis_rules(RULES):
            traced = str(run(STATES))
    tpu = device is not None and device[1] == "tpu"
    assert ("pallas_call" in traced) == (kernel == "splash" or (kernel == "auto" and tpu))
    if "pallas_call" in traced:
        assert ("interpret=False" in traced) == tpu and ("shard_map" in traced) == (device is not None)


def params_of(shapes):
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


# -- on a TPU -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tpu_mesh():
    """A mesh of four simulated chips."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (pip install -e '.[tpu]'): nothing can be compiled for a TPU")
    with compilation_cache.turned_off():
        yield make_mesh(data=1, fsdp=2, tensor=2, devices=topologies.devices("v5e:2x2"))


@pytest.mark.pod
@pytest.mark.parametrize("pattern", [Row(), Column(), Convolutional(11), Full(), Bidirectional()], ids=str)
def test_compiles_for_a_tpu_at_the_papers_size(tpu_mesh, pattern):
    """Compiles forward and backward with 4 examples and 4 heads of 64 per chip."""
    shape = (8, PAPER.length, 8, 64)
    with on_mesh(tpu_mesh), jax.default_matmul_precision("default"):
        sharding = NamedSharding(tpu_mesh, partition_spec(HEADS, shape, tpu_mesh))
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
        step = jax.jit(lambda *x: with_gradients(lambda *y: splash.attend(*y, pattern, PAPER), *x))
        program = step.lower(x, x, x, x).compile()
    text = program.as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}" in text
    assert "all-" not in text and "collective" not in text, "devices exchange nothing"
    scores = 4 * 4 * PAPER.length**2 * 4  # bytes that a dense softmax would keep
    assert program.memory_analysis().temp_size_in_bytes < scores


@pytest.mark.parametrize(
    "remat, forward, products",
    [("full", 8, 10), ("attended", 4, 10), ("mlp", 4, 8), ("branches", 4, 7), ("attention", 4, 7), ("dots", 4, 0)],
)
def test_a_sharded_trunk_compiles_for_a_tpu(tpu_mesh, remat, forward, products):
    """A scanned, rematerialised trunk with the kernel "auto" compiles with parameters, batch and heads sharded.

    All policies but "full" keep the kernel's output, so that the backward pass does not run the kernel again. They also
    run fewer products of a layer again, counted in units of the attention's output (12 forward, 24 backward).
    """
    options = TransformerOptions(width=256, depth=4, heads=4, remat=remat)
    layout = layout_of(64, 8, 8)
    trunk = Trunk(options, layout, (Row(), Column(), Row(), Column()))
    with on_mesh(tpu_mesh), jax.default_matmul_precision("default"):
        shape = (4, layout.length, options.width)
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=batch_sharding(tpu_mesh))
        boxed = jax.eval_shape(lambda: trunk.init(jax.random.key(0), jnp.zeros(shape, jnp.bfloat16), False))
        params = jax.eval_shape(lambda: nn.meta.unbox(boxed_like(boxed)))
        params = abstract(params, shardings_of(boxed, tpu_mesh))
        loss = lambda params, x: jnp.square(trunk.apply(params, x, True).astype(jnp.float32)).mean()
        text = jax.jit(jax.grad(loss)).lower(params, x).compile({"exec_time_optimization_effort": -1.0}).as_text()
    kernels = ("splash_mha_fwd_residuals", "splash_mha_dq_no_residuals", "splash_mha_dkv_no_residuals")
    assert Program(text).silent_kernels == dict(zip(kernels, (forward, 4, 4)))
    chips, unit = 4, 2 * shape[0] * shape[1] * options.width**2
    assert chips * Program(text).flops / (options.depth * unit) == pytest.approx(36 + products, abs=0.1)
    assert "collective-permute" not in text  # no ring of partial products


def boxed_like(boxed):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), boxed)
