"""The device mesh: axes `data`, `fsdp` and `tensor` over the devices of one or several hosts."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from dalle_jax.errors import MeshError

MESH_AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh of axes (data, fsdp, tensor).

    Several slices are TPU pods joined by the network of a data center, which is far slower than the links inside a
    slice. On several slices only `data` crosses from one slice to another: gradients do, once per step.

    Args:
      data, fsdp, tensor: size of each axis. At most one may be -1, which stands for all remaining devices.
      devices: the devices to use. Default: all devices of all hosts.

    Returns:
      A mesh with automatic axes: `jax.jit` derives the layout of intermediate values.

    Raises:
      MeshError: the sizes do not multiply to the number of devices, or `data` does not cover the slices evenly. On
        one host a smaller mesh is allowed: the other devices stay idle, which is logged.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise MeshError(
            f"Mesh {asked}: every axis needs a positive size; one of them may be -1 (all remaining devices)."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    count = len(devices)
    fits = count % fixed == 0 if free else fixed <= count
    if not fits:
        raise MeshError(
            f"Mesh {asked} does not fit {count} devices ({devices[0].device_kind}): it needs "
            f"{'a multiple of ' if free else ''}{fixed} devices. Change config.mesh so that data*fsdp*tensor = {count}."
        )
    if free:
        sizes[free[0]] = count // fixed
    used = math.prod(sizes.values())
    if used < count:
        if jax.process_count() > 1:
            raise MeshError(f"Mesh {asked} uses {used} of {count} devices; with several hosts it must use all of them.")
        _warn_once(f"Mesh {asked} uses {used} of {count} devices.")
    automatic = (AxisType.Auto,) * len(MESH_AXES)
    if len({_slice(device) for device in devices}) > 1:
        return Mesh(_over_slices(devices, **sizes), MESH_AXES, axis_types=automatic)
    # On v5p and v6e, jax.make_mesh rejects an axis that is not a product of whole axes of the torus.
    laid_out = mesh_utils.create_device_mesh(tuple(sizes.values()), devices[:used], allow_split_physical_axes=True)
    return Mesh(laid_out, MESH_AXES, axis_types=automatic)


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning("%s", message)


def local_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Builds a mesh of the devices of this host alone."""
    return make_mesh(data, fsdp, tensor, devices=jax.local_devices())


def _slice(device: Any) -> int:
    """Returns the index of the slice of a device, 0 on platforms without slices."""
    return getattr(device, "slice_index", None) or 0


def _over_slices(devices: Sequence[Any], data: int, fsdp: int, tensor: int) -> np.ndarray:
    """Arranges the devices of several slices as an array [data, fsdp, tensor], one slice after another along `data`."""
    sizes = collections.Counter(_slice(device) for device in devices)
    slices = len(sizes)
    if data % slices or len(set(sizes.values())) > 1 or data * fsdp * tensor != len(devices):
        raise MeshError(
            f"Mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {slices} slices of "
            f"{', '.join(str(size) for size in sizes.values())} devices: only data may cross slices. Use all "
            f"devices of slices of equal size, and a config.mesh.data that is a multiple of {slices}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


def describe(mesh: Mesh) -> str:
    """Returns the devices of a mesh in words: "8 devices (TPU v5e) on 2 hosts: data=4, fsdp=2, tensor=1"."""
    hosts = jax.process_count()
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    where = f" on {hosts} hosts" if hosts > 1 else ""
    return f"{mesh.size} devices ({mesh.devices.flat[0].device_kind}){where}: {axes}"
