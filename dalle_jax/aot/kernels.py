"""How long the attention kernels of a program take, of which the compiler tells nothing.

From the instructions that it scheduled for them, for each chip (`splash.SCHEDULES`): a kernel's grid goes over the
blocks of a mask, and computes the filled ones. Waiting for memory is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dalle_jax.aot import topologies
from dalle_jax.aot.topologies import Chip
from dalle_jax.models.attention import splash
from dalle_jax.models.attention.patterns import Pattern
from dalle_jax.token_layout import TokenLayout


def seconds(
    calls: Mapping[str, int], patterns: Sequence[Pattern], layout: TokenLayout, queries: int, heads: float, chip: Chip
) -> float | None:
    """Of all calls together, on one chip.

    Args:
      calls: by kernel, see `Program.silent_kernels`: each layer's pattern is taken equally often.
      patterns: of the layers.
      layout: of the stream.
      queries: positions that ask; S, or N where only the image does.
      heads: of all rows that a chip has, in one call.
      chip: which.

    Returns:
      Seconds; None where one of the kernels is not known here.
    """
    total = 0.0
    for name, count in calls.items():
        kind = next((kind for kind in splash.KERNEL_KINDS if name.startswith(f"splash_mha_{kind}_")), None)
        if kind is None:
            return None
        cycles = [splash.kernel_cycles(kind, pattern, layout, queries, chip.name) for pattern in patterns]
        cores = chip.cores if kind == "fwd" else 1  # the backward kernels do not share their heads
        total += count * heads * sum(cycles) / len(cycles) / cores / chip.clock
    return total


def of_subject(calls: Mapping[str, int], subject: Any, rows: int, sampling: bool) -> float | None:
    """`seconds` of a program of `compile.Subject`, for so many rows on all chips together; 0 without such calls."""
    if not calls:
        return 0.0
    prior, mesh = getattr(subject.task, "prior", None), subject.mesh
    if prior is None:
        return None
    slices = 1 if sampling else subject.options.accumulate_steps
    heads = rows * prior.options.trunk.heads / mesh.size / slices
    layout = prior.layout
    queries = layout.image_length if sampling else layout.length
    return seconds(calls, prior.options.patterns, layout, queries, heads, topologies.chip(mesh.devices.flat[0]))
