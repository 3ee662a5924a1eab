"""Batches over the mesh: which rows a host makes, and how they reach the devices and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from dalle_jax.distributed.sharding import batch_sharding, batch_shards, on_mesh, replicated
from dalle_jax.errors import ConfigError, MeshError

T = TypeVar("T")


def check_batch(mesh: Mesh, batch_size: int, accumulate_steps: int = 1) -> None:
    """Checks that a global batch can be split over the mesh, in `accumulate_steps` slices.

    Raises:
      ConfigError: a batch without rows.
      MeshError: it cannot be split.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected at least 1.")
    shards = batch_shards(mesh) * accumulate_steps
    if batch_size % shards:
        raise MeshError(
            f"batch_size={batch_size} cannot be split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} "
            f"devices in {accumulate_steps} accumulation step(s): give a multiple of {shards}, or another config.mesh."
        )


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch lie on this host's devices: what its data pipeline has to make.

    Args:
      mesh: a mesh over the devices of all hosts. Hosts that share a row (its `tensor` axis crosses them) each get it.
      batch_size: B, which `check_batch` has accepted.

    Returns:
      Row numbers, int [b], rising; all of them where there is one host.
    """
    size = batch_size // batch_shards(mesh)
    return np.concatenate([np.arange(part * size, (part + 1) * size) for part in _host_parts(batch_sharding(mesh))])


def _host_parts(sharding: NamedSharding) -> list[int]:
    """Which of the parts that a batch is split into lie on this host's devices, rising."""
    indices = sharding.addressable_devices_indices_map((batch_shards(sharding.mesh),))
    return sorted({index[0].start or 0 for index in indices.values()})


def to_mesh(batch: Any, sharding: NamedSharding) -> Any:
    """Makes global arrays from this host's part of a batch.

    Args:
      batch: tree of host arrays, the rows of `host_rows` (all rows where there is one process).  Arrays that are on
        the mesh already pass unchanged.
      sharding: layout of the result, as from `batch_sharding`.

    Returns:
      The same tree of global `jax.Array`s.  The copy to the devices is asynchronous.
    """

    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)

    parts, here = batch_shards(sharding.mesh), len(_host_parts(sharding))

    def put(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        x = np.asarray(x)
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] * parts // here, *x.shape[1:]))

    return jax.tree.map(put, batch)


def over_rows(mesh: Mesh | None, function: Callable[..., T], *rows: Any) -> T:
    """Calls a function on a mesh, with rows split over its devices: drawing and judging, where batches come from here.

    Args:
      mesh: one host's; None: no mesh, the default device.
      function: what it takes beside `rows` (parameters) is on the mesh already.
      *rows: trees of arrays [B, ...], on the host, the default device or the mesh. Where the devices do not divide B,
        each gets all rows.

    Returns:
      What `function` gives.
    """
    if mesh is None:
        return function(*rows)
    split, whole = batch_sharding(mesh), replicated(mesh)
    layouts = jax.tree.map(lambda x: whole if x.shape[0] % batch_shards(mesh) else split, rows)
    with on_mesh(mesh):
        return function(*jax.device_put(rows, layouts))


def to_host(tree: Any) -> Any:
    """Numpy arrays, whole, of arrays on the mesh: the same on every host, and every host has to call it."""

    def whole(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))
