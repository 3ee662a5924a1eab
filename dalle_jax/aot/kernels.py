"""Estimates the time of attention kernels, whose cost the compiler does not report.

The estimate uses the instructions that the compiler scheduled for each kernel on each chip (`splash.SCHEDULES`). The
grid of a kernel visits all blocks of a mask and computes the filled ones. Memory stalls are not included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dalle_jax.aot import topologies
from dalle_jax.aot.target import Subject
from dalle_jax.aot.topologies import Chip
from dalle_jax.models.attention import splash
from dalle_jax.models.attention.patterns import Pattern
from dalle_jax.token_layout import TokenLayout


def seconds(
    calls: Mapping[str, int], patterns: Sequence[Pattern], layout: TokenLayout, queries: int, heads: float, chip: Chip
) -> float | None:
    """Estimates the time of all kernel calls on one chip.

    Args:
      calls: calls by kernel, see `Program.silent_kernels`. They are spread evenly over the patterns.
      patterns: attention patterns of the layers.
      layout: layout of the token stream.
      queries: query positions: S, or N if only image positions are queries.
      heads: heads per call, summed over all rows of a chip.
      chip: the chip.

    Returns:
      Seconds, or None if one of the kernels is unknown.
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


def of_subject(calls: Mapping[str, int], subject: Subject, rows: int, sampling: bool) -> float | None:
    """Estimates the time of all kernel calls in a program of a subject.

    Args:
      calls: calls by kernel, see `Program.silent_kernels`.
      subject: the training that was compiled.
      rows: rows per run of the program, on all chips together.
      sampling: whether the program is the sampler.

    Returns:
      Seconds on one chip: 0 without calls, None if a kernel or the model is unknown.
    """
    if not calls:
        return 0.0
    prior, mesh = getattr(subject.task, "prior", None), subject.mesh
    if prior is None:
        return None
    slices = 1 if sampling else subject.options.accumulate_steps
    heads = rows * prior.options.trunk.heads / mesh.size / slices
    layout = prior.stream
    over_all = not sampling or getattr(prior.options, "text_reads_image", False)
    queries = layout.length if over_all else layout.image_length
    return seconds(calls, prior.options.patterns, layout, queries, heads, topologies.chip(mesh.devices.flat[0]))
