"""Batches on the mesh: the rows that each host loads, and their way to the devices and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from dalle_jax.distributed.sharding import batch_sharding, batch_shards, on_mesh, replicated
from dalle_jax.errors import ConfigError, MeshError
from dalle_jax.pytree import PyTree

T = TypeVar("T")


def check_batch(mesh: Mesh, batch_size: int, accumulate_steps: int = 1) -> None:
    """Checks that a global batch can be split over the mesh, in `accumulate_steps` slices.

    Raises:
      ConfigError: the batch has no rows.
      MeshError: it cannot be split.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected at least 1.")
    shards = batch_shards(mesh) * accumulate_steps
    if batch_size % shards:
        raise MeshError(
            f"batch_size={batch_size} cannot be split over data={mesh.shape['data']} x fsdp={mesh.shape['fsdp']} "
            f"devices in {accumulate_steps} accumulation step(s). Give a multiple of {shards}, or another config.mesh."
        )


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that the data pipeline of this host has to load.

    Args:
      mesh: a mesh of the devices of all hosts. If its `tensor` axis crosses hosts, each of them loads the shared rows.
      batch_size: B, as accepted by `check_batch`.

    Returns:
      Row indices in ascending order, int [b]. All rows on a single host.
    """
    size = batch_size // batch_shards(mesh)
    return np.concatenate([np.arange(part * size, (part + 1) * size) for part in _host_parts(batch_sharding(mesh))])


def _host_parts(sharding: NamedSharding) -> list[int]:
    """Returns the indices, in ascending order, of the batch shards on the devices of this host."""
    indices = sharding.addressable_devices_indices_map((batch_shards(sharding.mesh),))
    return sorted({index[0].start or 0 for index in indices.values()})


def to_mesh(batch: PyTree, sharding: NamedSharding) -> PyTree:
    """Creates global arrays from this host's part of a batch.

    Args:
      batch: tree of host arrays with the rows of `host_rows`. Arrays that are already on the mesh pass unchanged.
      sharding: layout of the result, as from `batch_sharding`.

    Returns:
      The same tree with global `jax.Array`s. The copy to the devices is asynchronous.
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


def over_rows(mesh: Mesh | None, function: Callable[..., T], *rows: PyTree) -> T:
    """Calls a function on a mesh of this host, with rows split over its devices. Sampling and evaluation use it.

    Args:
      mesh: a mesh of this host, or None for the default device.
      function: called with `rows`. Its other inputs, such as parameters, are already on the mesh.
      *rows: trees of arrays [B, ...] on the host, the default device or the mesh. If the devices do not divide B, each
        device gets all rows.

    Returns:
      The result of `function`.
    """
    if mesh is None:
        return function(*rows)
    split, whole = batch_sharding(mesh), replicated(mesh)
    layouts = jax.tree.map(lambda x: whole if x.shape[0] % batch_shards(mesh) else split, rows)
    with on_mesh(mesh):
        return function(*jax.device_put(rows, layouts))


def to_host(tree: PyTree) -> PyTree:
    """Copies arrays from the mesh to complete numpy arrays, the same on every host. Every host must call it."""

    def whole(x: Any) -> Any:
        here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        return x if here else multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))
