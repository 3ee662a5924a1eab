"""What to change where a program does not fit: the nearest remedy, with numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from dalle_jax.aot import topologies
from dalle_jax.aot.costs import bytes_per_chip
from dalle_jax.aot.topologies import GIB
from dalle_jax.distributed.sharding import batch_shards
from dalle_jax.models.transformer import REMAT

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_KEPT_FREE = 0.9  # of the memory: shapes padded to tiles take some


def needed_and_available(message: str) -> tuple[float, float] | None:
    """Bytes from the compiler's "Used 20.5G of 15.75G hbm"; None where it says otherwise."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    return found and (float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]])


def explain(
    options: Any,
    subject: Any,
    arguments: Mapping[str, Any],
    memory: tuple[float, float] | None,
    message: str = "",
) -> str:
    """The error for a program that does not fit.

    Args:
      options: `compile.CompileOptions`.
      subject: `compile.Subject`.
      arguments: of the program, see `figures.figures`.
      memory: bytes that the program needs, and those that there are, on each chip; None where the compiler, which
        refused it, does not say.
      message: what it says then.

    Returns:
      What was given, how much it needs, and what would help.
    """
    chip = topologies.chip(subject.mesh.devices.flat[0])
    needed, available = memory or (math.nan, chip.memory)
    state, gradients = bytes_per_chip(arguments), bytes_per_chip(arguments["parameters"])
    lasting = state + (gradients if options.what == "train" else 0)
    said = f"it needs {needed / GIB:.2f} GiB" if needed == needed else message.partition("\n")[0]
    head = (
        f"{options.target} does not fit {options.topology} (mesh {dict(subject.mesh.shape)}): {said} of {chip.name}'s "
        f"{available / GIB:.2f} GiB on each chip, {state / GIB:.2f} of them for {', '.join(arguments)}. "
    )
    return head + "; ".join(_remedies(options, subject, needed, available, lasting))


def _remedies(options: Any, subject: Any, needed: float, available: float, lasting: float) -> list[str]:
    """The nearest first."""
    config, mesh = subject.config, subject.mesh
    found = []
    passing = max(needed - lasting, 0.0) if needed == needed else 0.0
    room = _KEPT_FREE * available - lasting
    if options.what == "sample":
        if room > 0 and options.rows > batch_shards(mesh):
            fewer = max(int(options.rows * room / passing) if passing else options.rows // 2, 1)
            shards = batch_shards(mesh)
            found.append(f"Draw fewer pictures at once: --config.rows={max(fewer // shards, 1) * shards}")
        return [*found, *_split(config, mesh, available, lasting, passing)] or [_larger(options)]
    if room > 0:  # what passes is too much: recompute, or take the batch in slices
        remat = config.model.get("trunk", {}).get("remat", "full")
        if fewer := list(REMAT)[: list(REMAT).index(remat)]:
            found.append(f"Keep fewer activations: model.trunk.remat={' or '.join(fewer)} (now {remat})")
        ways = _slices(config, mesh, passing, room)
        if ways:
            found.append(f"Take the batch in slices: optimizer.accumulate_steps={ways}")
    found += _split(config, mesh, available, lasting, passing)
    return [f"{remedy[0].upper()}{remedy[1:]}" for remedy in found] or [_larger(options)]


def _slices(config: Any, mesh: Any, passing: float, room: float) -> int | None:
    """The smallest number of accumulation steps after which the activations fit, if the batch allows one."""
    if config.task == "clip":
        return None
    now, rows = config.optimizer.accumulate_steps, config.batch_size // batch_shards(mesh)
    fitting = (n for n in range(now + 1, rows + 1) if rows % n == 0 and passing * now / n <= room)
    return next(fitting, None)


def _split(config: Any, mesh: Any, available: float, lasting: float, passing: float) -> list[str]:
    """The smallest larger fsdp axis with which the state fits, taken from the data axis."""
    sizes = dict(mesh.shape)
    width = config.model.trunk.width if "trunk" in config.model else sizes["fsdp"] * sizes["data"]
    for factor in range(2, sizes["data"] + 1):
        fsdp = sizes["fsdp"] * factor
        divides = sizes["data"] % factor == 0 and width % fsdp == 0
        if divides and lasting / factor + passing <= _KEPT_FREE * available:
            return [f"split the parameters further: mesh.fsdp={fsdp},mesh.data={sizes['data'] // factor}"]
    return []


def _larger(options: Any) -> str:
    smaller = "batch_size" if options.what == "train" else "rows"
    return f"Give a topology with more chips or memory than {options.topology}, or a smaller {smaller}"
