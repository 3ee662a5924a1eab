"""The work that is read from the text of a compiled program."""

import jax
import jax.numpy as jnp
import pytest

from dalle_jax.aot.program import Program

# A loop of ten that gathers while it multiplies, and exchanges outside of it in every notation.
TEXT = """
HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%slicing (p0: f32[10,8,4], p1: s32[]) -> f32[8,4] {
  %p0 = f32[10,8,4]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %flat = f32[8,4]{1,0} bitcast(%slice)
}

%body (carry: (s32[], f32[16,4], f32[10,8,4])) -> (s32[], f32[16,4], f32[10,8,4]) {
  %carry = (s32[], f32[16,4]{1,0:T(8,128)}, f32[10,8,4]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %x = f32[16,4]{1,0} get-tuple-element(%carry), index=1
  %stack = f32[10,8,4]{2,1,0} get-tuple-element(%carry), index=2
  %w = f32[8,4]{1,0} fusion(%stack, %i), kind=kLoop, calls=%slicing
  %start = (f32[8,4]{1,0}, f32[16,4]{1,0}) all-gather-start(%w), replica_groups={{0,1},{2,3}}, dimensions={0}
  %other = f32[16,16]{1,0:T(8,128)S(1)} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  %done = f32[16,4]{1,0} all-gather-done(%start)
  %y = f32[16,4]{1,0} dot(%other, %done), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %next = (s32[], f32[16,4]{1,0}, f32[10,8,4]{2,1,0}) tuple(%i, %y, %stack)
}

%condition (carry.1: (s32[], f32[16,4], f32[10,8,4])) -> pred[] {
  %carry.1 = (s32[], f32[16,4]{1,0}, f32[10,8,4]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%carry.1), index=0
  %ten = s32[] constant(10)
  ROOT %less = pred[] compare(%j, %ten), direction=LT
}

ENTRY %main (x0: f32[16,4], stack0: f32[10,8,4]) -> f32[4,4] {
  %x0 = f32[16,4]{1,0} parameter(0)
  %stack0 = f32[10,8,4]{2,1,0} parameter(1)
  %zero0 = s32[] constant(0)
  %start0 = (s32[], f32[16,4]{1,0}, f32[10,8,4]{2,1,0}) tuple(%zero0, %x0, %stack0)
  %loop = (s32[], f32[16,4]{1,0}, f32[10,8,4]{2,1,0}) while(%start0), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %x1 = f32[16,4]{1,0} get-tuple-element(%loop), index=1
  %all = f32[16,4]{1,0} all-reduce(%x1), replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add, metadata={op_name="jit(step)/loss"}
  ROOT %part = f32[4,4]{1,0} reduce-scatter(%all), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_a_loop_counts_once_per_iteration():
    program = Program(TEXT)
    assert program.flops == 10 * (2 * 16 * 16 * 4 + 2 * 16 * 16 * 4)
    gather, reduction, scatter = sorted(program.collectives, key=lambda c: c.kind)
    assert (gather.kind, gather.times, gather.bytes, gather.in_loop) == ("all-gather", 10, 16 * 4 * 4, True)
    assert (reduction.kind, reduction.times, reduction.in_loop) == ("all-reduce", 1, False)
    assert (scatter.kind, scatter.bytes) == (
        "reduce-scatter",
        16 * 4 * 4,
    )  # bytes of the complete array


@pytest.mark.parametrize("precision, passes", [("default", 1), ("high", 3), ("highest", 6)])
def test_a_product_in_full_precision_counts_each_of_its_passes(precision, passes):
    line = "%y = f32[16,4]{1,0} dot(%other, %done), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    assert line in TEXT
    again = TEXT.replace(line, f"{line}, operand_precision={{{precision},{precision}}}")
    assert Program(again).flops - Program(TEXT).flops == 10 * (passes - 1) * 2 * 16 * 4 * 16


def test_groups_in_every_notation():
    gather, reduction, scatter = sorted(Program(TEXT).collectives, key=lambda c: c.kind)
    assert gather.group == (0, 1)
    assert reduction.group == (0, 2)
    assert scatter.group == (0, 1, 2, 3)
    assert reduction.name == "jit(step)/loss"
    turned = TEXT.replace("mesh['data'=2,'fsdp'=4] {'fsdp'}", "mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}")
    assert {c.kind: c.group for c in Program(turned).collectives}["reduce-scatter"] == (0, 1, 2, 3)
    assert gather.sent == 10 * 256 / 2 and reduction.sent == 2 * 256 / 2 and scatter.sent == 256 * 3 / 4


def test_overlapped_means_work_between_start_and_end():
    gather = next(c for c in Program(TEXT).collectives if c.kind == "all-gather")
    assert gather.overlapped
    lines = TEXT.splitlines()
    other = next(line for line in lines if "%other =" in line)
    done = next(i for i, line in enumerate(lines) if "%done =" in line)
    lines.remove(other)
    lines.insert(done, other)  # now after the end of the exchange
    gather = next(c for c in Program("\n".join(lines)).collectives if c.kind == "all-gather")
    assert not gather.overlapped


@pytest.mark.parametrize("way", ["async-start(%w), calls", "call-start(%w), to_apply"])
def test_exchanges_within_asynchronous_calls_and_fusions(way):
    """The compiler writes overlapped exchanges in these other ways; the second one is that of a SparseCore."""
    gather = "  ROOT %g = f32[16,4]{1,0} all-gather(%q), replica_groups={{0,1},{2,3}}, dimensions={0}\n}\n"
    wrapped = "%wrapped (q: f32[8,4]) -> f32[16,4] {\n  %q = f32[8,4]{1,0} parameter(0)\n" + gather
    start = next(line for line in TEXT.splitlines() if "%start =" in line)
    call = "  %start = ((f32[8,4]{1,0}), f32[16,4]{1,0}, u32[]) async-start(%w), calls=%wrapped"
    opened = TEXT.replace("%add (a", f"{wrapped}\n%add (a", 1)
    text = opened.replace(start, call).replace("all-gather-done", "async-done")
    asynchronous = text.replace("async-start(%w), calls", way).replace("async-done", f"{way.partition('-')[0]}-done")
    found = next(c for c in Program(asynchronous).collectives if c.kind == "all-gather")
    assert (found.times, found.bytes, found.in_loop, found.overlapped) == (10, 256, True, True)

    fused = call.replace("((f32[8,4]{1,0}), f32[16,4]{1,0}, u32[]) async-start", "f32[16,4]{1,0} fusion")
    alone = text.replace(call, fused).replace("async-done(%start)", "copy(%start)")
    assert not next(c for c in Program(alone).collectives if c.kind == "all-gather").overlapped
    product = "  %p = f32[8,8]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={1}\n" + gather
    found = next(c for c in Program(alone.replace(gather, product)).collectives if c.kind == "all-gather")
    assert found.overlapped


def test_exchanges_in_parts_count_once():
    """Three fusions of one channel: the start, a product with a part of the exchange, and the end."""
    gather = (
        "%g{0} = f32[16,4]{{1,0}} all-gather(%q{0}), channel_id=7, replica_groups={{{{0,1}},{{2,3}}}}, dimensions={{0}}"
    )
    part = (
        "%part{0} (q{0}: f32[8,4], x{0}: f32[16,4]) -> (f32[16,16], f32[16,4]) {{\n"
        "  %q{0} = f32[8,4]{{1,0}} parameter(0)\n  %x{0} = f32[16,4]{{1,0}} parameter(1)\n  " + gather + "\n"
        "  {1}  ROOT %r{0} = (f32[16,16]{{1,0}}, f32[16,4]{{1,0}}) tuple(%d{0}, %g{0})\n}}\n"
    )
    product = "%d{0} = f32[16,16]{{1,0}} dot(%x{0}, %x{0}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}\n"
    nothing = "%d{0} = f32[16,16]{{1,0}} constant(0)\n"
    bodies = [part.format(i, (product if i == 2 else nothing).format(i)) for i in (1, 2, 3)]
    lines = TEXT.splitlines()
    calls = [
        f"  %c{i} = (f32[16,16]{{1,0}}, f32[16,4]{{1,0}}) fusion(%w, %x), kind=kCustom, calls=%part{i}"
        for i in (1, 2, 3)
    ]
    start = next(i for i, line in enumerate(lines) if "%start =" in line)
    lines[start : start + 3] = [*calls, "  %done = f32[16,4]{1,0} get-tuple-element(%c3), index=1", lines[start + 1]]
    entry = next(i for i, line in enumerate(lines) if line.startswith("%add (a"))
    program = Program("\n".join([*lines[:entry], *"".join(bodies).splitlines(), *lines[entry:]]))
    gathers = [c for c in program.collectives if c.kind == "all-gather"]
    assert [(c.times, c.bytes, c.overlapped) for c in gathers] == [(10, 256, True)]
    work = {one.name: one for one in program.work}
    assert work["c2"].flops == 2 * 16 * 16 * 4
    assert work["c2"].bytes == 16 * 4 * 4 + 16 * 16 * 4  # operand and product, without the exchanged arrays


def test_a_reduce_scatter_as_the_compiler_writes_it():
    """The compiler fuses an all-reduce with the slice that a device keeps."""
    body = (
        "%all-reduce-scatter.1 (q: f32[16,4]) -> f32[4,4] {\n  %q = f32[16,4]{1,0} parameter(0)\n"
        "  %r = f32[16,4]{1,0} all-reduce(%q), channel_id=9, replica_groups=[2,4]<=[8], to_apply=%add\n"
        "  ROOT %s = f32[4,4]{1,0} slice(%r), slice={[0:4], [0:4]}\n}\n"
    )
    part = next(line for line in TEXT.splitlines() if "ROOT %part" in line)
    call = "  ROOT %part = f32[4,4]{1,0} fusion(%all), kind=kCustom, calls=%all-reduce-scatter.1"
    program = Program(TEXT.replace(part, call).replace("ENTRY", f"{body}\nENTRY", 1))
    kinds = {c.kind: c for c in program.collectives}
    assert kinds["reduce-scatter"].sent == 256 * 3 / 4 and kinds["all-reduce"].sent == 2 * 256 / 2
    assert not kinds["reduce-scatter"].overlapped


def test_of_a_conditional_the_larger_branch_counts():
    branch = "%{0} (s: f32[16,4]) -> f32[16,16] {{\n  %s = f32[16,4]{{1,0}} parameter(0)\n{1}}}\n"
    product = "  {} = f32[16,16]{{1,0}} dot(%s, %s), lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}\n"
    small = branch.format("small", product.format("ROOT %one"))
    large = branch.format(
        "large",
        product.format("%first") + product.format("%second") + "  ROOT %sum2 = f32[16,16]{1,0} add(%first, %second)\n",
    )
    other = next(line for line in TEXT.splitlines() if "%other =" in line)
    choice = "  %other = f32[16,16]{1,0} conditional(%i, %x, %x), branch_computations={%small, %large}"
    text = TEXT.replace(other, choice).replace("%add (a", f"{small}\n{large}\n%add (a", 1)
    assert Program(text).flops == 10 * (2 * 2 * 16 * 16 * 4 + 2 * 16 * 16 * 4)


def test_kernels_without_a_stated_cost_are_listed():
    other = next(line for line in TEXT.splitlines() if "%other =" in line)
    call = '  %other = f32[16,16]{1,0} custom-call(%x, %x), custom_call_target="tpu_custom_call"'
    program = Program(
        TEXT.replace(other, call.replace("%other =", "%splash_mha_fwd_residuals.3 =")).replace(
            "(%other,", "(%splash_mha_fwd_residuals.3,"
        )
    )
    assert program.silent_kernels == {"splash_mha_fwd_residuals": 10}
    assert [w.times for w in program.work if w.silent] == [10]
    stated = call + ', backend_config={"custom_call_config":{"cost_estimate":{"flops":"12"}}}'
    assert not Program(TEXT.replace(other, stated)).silent_kernels


# The fusion %slicing as a fusion within a fusion.
NESTED = """%slicing (q0: f32[10,8,4], q1: s32[]) -> f32[8,4] {
  %q0 = f32[10,8,4]{2,1,0:T(8,128)} parameter(0)
  %q1 = s32[] parameter(1)
  %sliced = f32[8,4]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%inner
  ROOT %copied = f32[8,4]{1,0} bitcast(%sliced)
}

"""


def test_memory_traffic():
    work = {one.name: one for one in Program(TEXT).work}
    assert work["w"].bytes == 2 * 8 * 4 * 4 + 4  # the slice of the stack, read and written, and the index
    assert work["other"].bytes == 2 * 16 * 4 * 4  # its result stays in the fast memory
    assert work["y"].bytes == 2 * 16 * 4 * 4
    assert work["w"].times == 10
    nested = TEXT.replace("%slicing (p0", "%inner (p0").replace("%body (carry", NESTED + "%body (carry")
    assert {one.name: one for one in Program(nested).work}["w"].bytes == work["w"].bytes
    read_twice = nested.replace("bitcast(%sliced)", "add(%sliced, %q0)")
    assert {one.name: one for one in Program(read_twice).work}["w"].bytes == (10 + 1) * 8 * 4 * 4 + 4


UPDATING = """%inner (r0: f32[10,8,4], r1: f32[1,8,4], r2: s32[]) -> f32[10,8,4] {
  %r0 = f32[10,8,4]{2,1,0} parameter(0)
  %r1 = f32[1,8,4]{2,1,0} parameter(1)
  %r2 = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %updated = f32[10,8,4]{2,1,0} dynamic-update-slice(%r0, %r1, %r2, %nought, %nought)
}

%updating (s0: f32[10,8,4], s1: f32[1,8,4], s2: s32[]) -> f32[10,8,4] {
  %s0 = f32[10,8,4]{2,1,0} parameter(0)
  %s1 = f32[1,8,4]{2,1,0} parameter(1)
  %s2 = s32[] parameter(2)
  ROOT %within = f32[10,8,4]{2,1,0} fusion(%s0, %s1, %s2), kind=kLoop, calls=%inner
}

%with_exchange (t0: f32[10,8,4], t1: f32[1,8,4], t2: s32[], t3: f32[8,4]) -> (f32[10,8,4], f32[16,4]) {
  %t0 = f32[10,8,4]{2,1,0} parameter(0)
  %t1 = f32[1,8,4]{2,1,0} parameter(1)
  %t2 = s32[] parameter(2)
  %t3 = f32[8,4]{1,0} parameter(3)
  %none = s32[] constant(0)
  %after = f32[10,8,4]{2,1,0} dynamic-update-slice(%t0, %t1, %t2, %none, %none)
  %gathered = f32[16,4]{1,0} all-gather(%t3), replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %both = (f32[10,8,4]{2,1,0}, f32[16,4]{1,0}) tuple(%after, %gathered)
}

"""


@pytest.mark.parametrize("called", ["inner", "updating", "with_exchange"])
def test_memory_traffic_of_a_slice_that_is_written(called):
    """The slice, read and written, and the index count. They may be in a nested fusion, or next to an exchange."""
    part = "  %part = f32[1,8,4]{2,1,0} bitcast(%w)\n"
    new = f"  %new = f32[10,8,4]{{2,1,0}} fusion(%stack, %part, %i), kind=kLoop, calls=%{called}\n"
    if called == "with_exchange":
        new = new.replace("f32[10,8,4]{2,1,0} f", "(f32[10,8,4]{2,1,0}, f32[16,4]{1,0}) f").replace("%i)", "%i, %w)")
    text = TEXT.replace("%body (carry", UPDATING + "%body (carry").replace("  %y = ", part + new + "  %y = ")
    assert {one.name: one for one in Program(text).work}["new"].bytes == 2 * 8 * 4 * 4 + 4


def test_a_loop_of_unknown_length_is_listed():
    unsaid = TEXT.replace("known_trip_count", "something")
    assert not Program(unsaid).unknown_loops and Program(unsaid).flops == Program(TEXT).flops  # its condition says ten
    assert Program(unsaid.replace("direction=LT", "direction=NE")).unknown_loops == ["loop"]
    with pytest.raises(ValueError, match="ENTRY"):
        Program("nothing")


@pytest.mark.parametrize("length", [1, 7])
def test_products_of_a_compiled_scan(length):
    """XLA's own count is right only for length 1, because it counts a body once."""

    def f(x, stack):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    compiled = jax.jit(f).lower(jnp.zeros((16, 32)), jnp.zeros((length, 32, 32))).compile()
    assert Program(compiled.as_text()).flops == length * 2 * 16 * 32 * 32


@pytest.mark.parametrize(
    "strides, padding, spread, groups",
    [((1, 1), "SAME", (1, 1), 1), ((2, 2), "VALID", (1, 1), 1), ((1, 1), ((2, 1), (0, 3)), (2, 3), 1),
     ((1, 1), "SAME", (1, 1), 4)],
)  # fmt: skip
def test_products_of_convolutions(strides, padding, spread, groups):
    """The count equals XLA's, which also leaves out padding and dilation."""

    def f(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, strides, padding, lhs_dilation=spread, dimension_numbers=dims, feature_group_count=groups
        )

    lowered = jax.jit(f).lower(jnp.zeros((2, 9, 7, 8)), jnp.zeros((3, 3, 8 // groups, 12)))
    text = lowered.compiler_ir("hlo").as_hlo_module().to_string()
    assert Program(text).flops == lowered.cost_analysis()["flops"]
