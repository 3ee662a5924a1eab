"""The figures of a compiled program, and the table of them.

Roofline. One instruction takes as long as its matrix products at the chip's peak, or as its bytes at the rate of its
main memory, whichever is longer; instructions follow each other. Exchanges with other chips take their bytes at the
rate of the links that they extend over; those that the compiler overlaps with other work cost only what exceeds it:

    step = max(Σ max(flops / peak, bytes / memory rate) + attention kernels, overlapped exchange) + other exchange
    utilisation = model flops / (chips · peak · step)

Attention kernels take what `kernels.py` counts, or what their operands and results cost, whichever is longer.
"""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dalle_jax.aot import topologies
from dalle_jax.aot.program import KINDS, Program
from dalle_jax.aot.topologies import GIB

_LARGE = 2**20  # bytes of a gather worth naming


def bytes_per_chip(tree: Any) -> int:
    """Of arrays with shardings, as far as one device holds them; layouts may pad them further."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def figures(
    mesh: Mesh,
    arguments: Mapping[str, Any],
    compiled: Any,
    program: Program,
    model_flops: float,
    rows: int,
    kernel_seconds: float | None,
) -> dict[str, Any]:
    """Everything that is known about a program before it ever ran; JSON.

    Args:
      mesh: what it was compiled for.
      arguments: trees of `ShapeDtypeStruct`s with shardings, by what they are; "parameters" among them.
      compiled: from `lowered.compile()`.
      program: its text, read.
      model_flops: what the model asks for, on all chips together.
      rows: examples in one run of the program.
      kernel_seconds: of the kernels that the program is silent about; None where that is not known.
    """
    everything = list(mesh.devices.flat)
    chip, memory = topologies.chip(everything[0]), compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip
    told = lambda w: max(w.flops / chip.flops, w.bytes / chip.memory_rate) * w.times
    here = [w for w in program.work if not w.aside]
    silent = sum(told(w) for w in here if w.silent)
    kernels = max(kernel_seconds or 0.0, silent)
    compute = sum(told(w) for w in here) - silent + kernels
    exchanges = [
        (c, c.sent / topologies.exchange_rate([everything[i] for i in c.group], everything))
        for c in program.collectives
        if len(c.group) > 1
    ]
    hidden = sum(seconds for c, seconds in exchanges if c.overlapped)
    exposed = sum(seconds for c, seconds in exchanges if not c.overlapped)
    step = max(compute, hidden) + exposed
    kinds = {}
    for kind in KINDS:
        those = [(c, s) for c, s in exchanges if c.kind == kind]
        size = sum(c.bytes * c.times for c, _ in those)
        kinds[kind] = {
            "count": sum(c.times for c, _ in those),
            "bytes": size,
            "overlapped": sum(c.bytes * c.times for c, _ in those if c.overlapped) / size if size else 0.0,
            "seconds": sum(s for _, s in those),
        }
    outside = collections.Counter()
    for c, _ in exchanges:
        if c.kind == "all-gather" and not c.in_loop and c.bytes >= _LARGE:
            outside[re.sub(r"layer_\d+", "layer_*", c.name) or "(no name)"] += c.bytes
    return {
        "chip": chip.name,
        "chips": len(everything),
        "mesh": dict(mesh.shape),
        "rows": rows,
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(arguments["parameters"])),
        "bytes": {
            **{name: bytes_per_chip(tree) for name, tree in arguments.items()},
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
            "total": total,
            "memory": chip.memory,
        },
        "fits": total <= chip.memory,
        "flops": {"model": model_flops / len(everything), "program": program.flops},
        "memory_traffic": program.hbm_bytes,
        "collectives": kinds,
        "gathers_outside_loops": dict(outside.most_common()),
        "unknown_loops": program.unknown_loops,
        "silent_kernels": program.silent_kernels,
        "kernels_known": kernel_seconds is not None,
        "seconds": {
            "products": program.flops / chip.flops,
            "memory": program.hbm_bytes / chip.memory_rate,
            "instructions": compute,
            "kernels": kernels,
            "exchange_overlapped": hidden,
            "exchange_exposed": exposed,
            "step": step,
            "compiler": sum(w.cycles * w.times for w in program.work) / chip.clock,
        },
        "utilisation": model_flops / len(everything) / chip.flops / step,
    }


def _fits(f: dict[str, Any]) -> str:
    if not f["fits"]:
        return "DOES NOT FIT"
    if f.get("effort") == "low" and f["bytes"]["total"] > 7 / 8 * f["bytes"]["memory"]:
        return "fits with low effort; the full one may need an eighth more"
    return "fits"


def table(f: dict[str, Any]) -> str:
    """The figures for people."""
    size, seconds, flops = f["bytes"], f["seconds"], f["flops"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in f["mesh"].items())
    gib = lambda x: f"{x / GIB:9.3f} GiB"
    lines = [
        f"{f['target']} {f['overrides']} · {f['what']} · {f['topology']}: {f['chips']} chips, mesh {mesh}",
        f"{f['parameters']:,} parameters, {f['rows']} rows; compiled in {f['compile_seconds']:.0f} s",
        "",
        "memory of one chip",
        *(f"  {name:22}{gib(size[name])}" for name in itertools.takewhile(lambda name: name != "arguments", size)),
        f"  {'arguments (all these)':22}{gib(size['arguments'])}   as laid out",
        f"  {'temporaries':22}{gib(size['temporaries'])}   activations, gradients, gathered parameters",
        f"  {'outputs not in place':22}{gib(size['outputs'])}",
        f"  {'program':22}{gib(size['program'])}",
        f"  {'total':22}{gib(size['total'])}   of {size['memory'] / GIB:.0f} GiB: " + _fits(f),
        "",
        "work of one chip in a step",
        f"  {'model':22}{flops['model'] / 1e12:9.3f} TFLOP",
        f"  {'program':22}{flops['program'] / 1e12:9.3f} TFLOP  {seconds['products'] * 1e3:10.2f} ms at its peak",
        f"  {'memory traffic':22}{gib(f['memory_traffic'])}    {seconds['memory'] * 1e3:10.2f} ms",
    ]
    for kind, one in f["collectives"].items():
        if one["count"]:
            lines.append(
                f"  {kind:22}{gib(one['bytes'])}    {one['seconds'] * 1e3:10.2f} ms"
                f"   {one['count']} times, {one['overlapped']:.0%} overlapped"
            )
    for name, gathered in f["gathers_outside_loops"].items():
        lines.append(f"  gathered outside of loops: {gathered / 2**20:.0f} MiB for {name}")
    lines += [
        "",
        f"step {seconds['step'] * 1e3:.1f} ms by the roofline: max(instructions {seconds['instructions'] * 1e3:.1f}, "
        f"overlapped exchange {seconds['exchange_overlapped'] * 1e3:.1f}) + other exchange "
        f"{seconds['exchange_exposed'] * 1e3:.1f}",
        f"utilisation {f['utilisation']:.1%} of the peak; the compiler's own estimates for the instructions alone: "
        f"{seconds['compiler'] * 1e3:.1f} ms",
    ]
    if f["unknown_loops"]:
        lines.append(f"loops of unknown length, counted once: {', '.join(f['unknown_loops'])}")
    if f["silent_kernels"]:
        calls = ", ".join(f"{name} {times} times" for name, times in f["silent_kernels"].items())
        lines.append(
            f"attention kernels {seconds['kernels'] * 1e3:.1f} ms of these, "
            + (
                "by the instructions scheduled for them"
                if f["kernels_known"]
                else "by their operands and results alone"
            )
            + f": {calls}"
        )
    return "\n".join(lines)
