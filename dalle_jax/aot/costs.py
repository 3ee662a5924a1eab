"""Costs of a compiled program (memory, work, exchanges, time), and their table.

The time is a roofline estimate:

    step = max(Σ max(flops / peak, bytes / memory rate) + attention kernels, overlapped exchange) + other exchange
    utilisation = model flops / (chips · peak · step)

The sum runs over all instructions, which do not overlap with each other. An exchange takes its bytes divided by the
rate of its links. Overlapped exchanges cost only the time that exceeds the instructions. Attention kernels take the
larger of the estimate of `kernels.py` and the memory traffic of their operands and results.
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
from dalle_jax.aot.hlo import COLLECTIVES
from dalle_jax.aot.program import Program, Work
from dalle_jax.aot.topologies import GIB
from dalle_jax.pytree import PyTree

_LARGE = 2**20  # smallest gather outside of loops that is listed, in bytes


def bytes_per_chip(tree: PyTree) -> int:
    """Returns the bytes that one device holds of arrays with shardings, without padding of layouts."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def costs_of(
    mesh: Mesh,
    arguments: Mapping[str, PyTree],
    compiled: jax.stages.Compiled,
    program: Program,
    model_flops: float,
    rows: int,
    kernel_seconds: float | None,
) -> dict[str, Any]:
    """Computes the costs of a program without running it.

    Args:
      mesh: the mesh that it was compiled for.
      arguments: arguments by name, trees of `ShapeDtypeStruct`s with shardings. "parameters" must be among them.
      compiled: the compiled program.
      program: its parsed text.
      model_flops: operations of the model, on all chips together.
      rows: examples per run of the program.
      kernel_seconds: time of the kernels that do not state their cost, or None if unknown.

    Returns:
      JSON values for one chip. "parameters", "rows" and "chips" are totals.
    """
    everything = list(mesh.devices.flat)
    chip, memory = topologies.chip(everything[0]), compiled.memory_analysis()
    total = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    )  # fmt: skip

    def roofline(work: Work) -> float:
        return max(work.flops / chip.flops, work.bytes / chip.memory_rate) * work.times

    here = [w for w in program.work if not w.aside]
    silent = sum(roofline(w) for w in here if w.silent)
    kernels = max(kernel_seconds or 0.0, silent)
    compute = sum(roofline(w) for w in here) - silent + kernels
    exchanges = [
        (c, c.sent / topologies.exchange_rate([everything[i] for i in c.group], everything))
        for c in program.collectives
        if len(c.group) > 1
    ]
    hidden = sum(seconds for c, seconds in exchanges if c.overlapped)
    exposed = sum(seconds for c, seconds in exchanges if not c.overlapped)
    step = max(compute, hidden) + exposed
    kinds = {}
    for kind in COLLECTIVES:
        of_kind = [(c, s) for c, s in exchanges if c.kind == kind]
        size = sum(c.bytes * c.times for c, _ in of_kind)
        kinds[kind] = {
            "count": sum(c.times for c, _ in of_kind),
            "bytes": size,
            "overlapped": sum(c.bytes * c.times for c, _ in of_kind if c.overlapped) / size if size else 0.0,
            "seconds": sum(s for _, s in of_kind),
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


def _fits(f: Mapping[str, Any]) -> str:
    if not f["fits"]:
        return "DOES NOT FIT"
    if f.get("effort") == "low" and f["bytes"]["total"] > 7 / 8 * f["bytes"]["memory"]:
        return "fits with low effort, but full effort may need an eighth more"
    return "fits"


def table(f: Mapping[str, Any]) -> str:
    """Formats the costs of a target, as from `compile_target`, as a text table."""
    size, seconds, flops = f["bytes"], f["seconds"], f["flops"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in f["mesh"].items())
    gib = lambda x: f"{x / GIB:9.3f} GiB"
    lines = [
        f"{f['target']} {f['overrides']} · {f['what']} · {f['topology']}: {f['chips']} chips, mesh {mesh}",
        f"{f['parameters']:,} parameters, {f['rows']} rows; compiled in {f['compile_seconds']:.0f} s",
        "",
        "memory of one chip",
        *(f"  {name:22}{gib(size[name])}" for name in itertools.takewhile(lambda name: name != "arguments", size)),
        f"  {'arguments (sum)':22}{gib(size['arguments'])}   with padding",
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
        f"step {seconds['step'] * 1e3:.1f} ms by roofline: max(instructions {seconds['instructions'] * 1e3:.1f}, "
        f"overlapped exchange {seconds['exchange_overlapped'] * 1e3:.1f}) + other exchange "
        f"{seconds['exchange_exposed'] * 1e3:.1f}",
        f"utilisation {f['utilisation']:.1%} of the peak; the compiler itself estimates "
        f"{seconds['compiler'] * 1e3:.1f} ms for the instructions",
    ]
    if f["unknown_loops"]:
        lines.append(f"loops of unknown length, counted once: {', '.join(f['unknown_loops'])}")
    if f["silent_kernels"]:
        calls = ", ".join(f"{name} {times} times" for name, times in f["silent_kernels"].items())
        lines.append(
            f"of these, attention kernels {seconds['kernels'] * 1e3:.1f} ms "
            + (
                "by the instructions scheduled for them"
                if f["kernels_known"]
                else "by their operands and results alone"
            )
            + f": {calls}"
        )
    return "\n".join(lines)
