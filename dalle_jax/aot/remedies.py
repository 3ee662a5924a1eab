"""Suggests changes for a program that does not fit into memory, with numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax.aot import topologies
from dalle_jax.aot.costs import bytes_per_chip
from dalle_jax.aot.target import CompileOptions, Subject
from dalle_jax.aot.topologies import GIB
from dalle_jax.distributed.sharding import batch_shards
from dalle_jax.models.transformer_options import REMAT
from dalle_jax.pytree import PyTree

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USABLE = 0.9  # fraction of the memory: padding of shapes to tiles uses the rest


def needed_and_available(message: str) -> tuple[float, float] | None:
    """Reads both numbers of bytes from the compiler's "Used 20.5G of 15.75G hbm". Returns None without that text."""
    found = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", message)
    return found and (float(found[1]) * _UNITS[found[2]], float(found[3]) * _UNITS[found[4]])


def explain(
    options: CompileOptions,
    subject: Subject,
    arguments: Mapping[str, PyTree],
    memory: tuple[float, float] | None,
    message: str = "",
) -> str:
    """Returns the error message for a program that does not fit.

    Args:
      options: the options of the compilation.
      subject: the training that was compiled.
      arguments: arguments of the program, see `costs.costs_of`.
      memory: bytes that the program needs and bytes available, per chip. None if the compiler rejected the program
        without these numbers.
      message: the compiler's message in that case.

    Returns:
      What was given, how much memory it needs, and what would help.
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


def _remedies(options: CompileOptions, subject: Subject, needed: float, available: float, lasting: float) -> list[str]:
    """Returns the suggestions, smallest change first."""
    config, mesh = subject.config, subject.mesh
    found = []
    temporary = max(needed - lasting, 0.0) if needed == needed else 0.0
    room = _USABLE * available - lasting
    if options.what == "sample":
        if room > 0 and options.rows > batch_shards(mesh):
            fewer = max(int(options.rows * room / temporary) if temporary else options.rows // 2, 1)
            shards = batch_shards(mesh)
            found.append(f"Sample fewer images at once: --config.rows={max(fewer // shards, 1) * shards}")
        return [*found, *_split(config, mesh, available, lasting, temporary)] or [_larger(options)]
    if room > 0:  # only the activations are too large: recompute them, or split the batch into slices
        remat = config.model.get("trunk", {}).get("remat", "full")
        if fewer := list(REMAT)[: list(REMAT).index(remat)]:
            found.append(f"Keep fewer activations: model.trunk.remat={' or '.join(fewer)} (now {remat})")
        ways = _slices(config, mesh, temporary, room)
        if ways:
            found.append(f"Split the batch into slices: optimizer.accumulate_steps={ways}")
    found += _split(config, mesh, available, lasting, temporary)
    return [f"{remedy[0].upper()}{remedy[1:]}" for remedy in found] or [_larger(options)]


def _slices(config: ConfigDict, mesh: Mesh, temporary: float, room: float) -> int | None:
    """Returns the smallest number of accumulation steps with which the activations fit, or None."""
    if config.task == "clip":
        return None
    now, rows = config.optimizer.accumulate_steps, config.batch_size // batch_shards(mesh)
    fitting = (n for n in range(now + 1, rows + 1) if rows % n == 0 and temporary * now / n <= room)
    return next(fitting, None)


def _split(config: ConfigDict, mesh: Mesh, available: float, lasting: float, temporary: float) -> list[str]:
    """Suggests the smallest larger fsdp axis with which the state fits, at the expense of the data axis."""
    sizes = dict(mesh.shape)
    width = config.model.trunk.width if "trunk" in config.model else sizes["fsdp"] * sizes["data"]
    for factor in range(2, sizes["data"] + 1):
        fsdp = sizes["fsdp"] * factor
        divides = sizes["data"] % factor == 0 and width % fsdp == 0
        if divides and lasting / factor + temporary <= _USABLE * available:
            return [f"split the parameters further: mesh.fsdp={fsdp},mesh.data={sizes['data'] // factor}"]
    return []


def _larger(options: CompileOptions) -> str:
    smaller = "batch_size" if options.what == "train" else "rows"
    return f"Give a topology with more chips or memory than {options.topology}, or a smaller {smaller}"
