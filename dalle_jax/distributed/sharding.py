"""The device mesh, and how named dimensions are laid out on it.

Every parameter and many activations name their dimensions ("embed", "heads", "batch", ...) beside their initializer.
One table, `RULES`, says which mesh axes each name is split over; nothing else in the package knows about devices:

    data     copies of the model, each with a part of the batch
    fsdp     as data, and the parameters are split over it too (gathered layer by layer when used)
    tensor   one matrix product split over several devices (heads, hidden units, vocabulary)

`jax.jit` with these shardings inserts the communication.  One device is the same code with a 1x1x1 mesh.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dalle_jax.errors import ConfigError, MeshError

T = TypeVar("T")

MESH_AXES = ("data", "fsdp", "tensor")

RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
    # activations
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("embed_act", None),
    # parameters of transformers
    ("layers", None),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv", None),
    ("vocab", "tensor"),
    ("text_vocab", "tensor"),
    ("positions", None),
    # parameters of convolutional networks
    ("conv_in", "fsdp"),
    ("conv_out", "tensor"),
    ("codebook", "tensor"),
)

# Options with which the TPU compiler gathers the parameters of one product while it computes another (those that
# MaxText publishes for v5p).
OVERLAP = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

# A dimension that its mesh axes do not divide is kept whole in arrays up to this many elements (three input channels,
# a bias); in a larger array that would quietly cost memory on every device, so it is an error.
MAX_UNDIVIDED_ELEMENTS = 2**20


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """Builds the mesh of axes (data, fsdp, tensor).

    Where the devices belong to several slices (TPU pods joined by a data center's network, far slower than the links
    inside of each), only `data` crosses from one to another: once a step, the gradients do.

    Args:
      data, fsdp, tensor: size of each axis; at most one may be -1 and takes all devices that are left.
      devices: the devices to use (default: all of them, of all hosts).

    Returns:
      A mesh whose axes are automatic: `jax.jit` derives the layout of intermediate values.

    Raises:
      MeshError: sizes that do not multiply to the number of devices, or a `data` that does not cover the slices
        evenly.  On one host a smaller mesh is allowed; the other devices idle, which is logged.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise MeshError(f"Mesh {asked}: every axis needs a positive size; one of them may be -1 (all that is left).")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    count = len(devices)
    fits = count % fixed == 0 if free else fixed <= count
    if not fits:
        raise MeshError(
            f"Mesh {asked} does not fit: it needs {'a multiple of ' if free else ''}{fixed} devices, there are {count} "
            f"({devices[0].device_kind}). Change config.mesh so that data*fsdp*tensor = {count}."
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
    # (jax.make_mesh refuses, on v5p and v6e, an axis that is no product of whole axes of the torus.)
    laid_out = mesh_utils.create_device_mesh(tuple(sizes.values()), devices[:used], allow_split_physical_axes=True)
    return Mesh(laid_out, MESH_AXES, axis_types=automatic)


@functools.cache
def _warn_once(message: str) -> None:
    logging.warning("%s", message)


def local_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """`make_mesh` of this host's devices: for what a host does by itself."""
    return make_mesh(data, fsdp, tensor, devices=jax.local_devices())


def _slice(device: Any) -> int:
    """Which slice a device belongs to; platforms without slices have one."""
    return getattr(device, "slice_index", None) or 0


def _over_slices(devices: Sequence[Any], data: int, fsdp: int, tensor: int) -> np.ndarray:
    """Devices of several slices as an array [data, fsdp, tensor], slice after slice along `data`."""
    sizes = collections.Counter(_slice(device) for device in devices)
    slices = len(sizes)
    if data % slices or len(set(sizes.values())) > 1 or data * fsdp * tensor != len(devices):
        raise MeshError(
            f"Mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fit {slices} slices of "
            f"{', '.join(str(size) for size in sizes.values())} devices: only data may cross slices. Give slices of "
            f"one size, all their devices, and a config.mesh.data that is a multiple of {slices}."
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, fsdp, tensor), (slices, 1, 1), devices, allow_split_physical_axes=True
    )


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Context in which `constrain` (and linen's own constraints) lay activations out on `mesh`; elsewhere no-ops."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks for the layout of an activation, one logical name (or None: whole) per dimension.

    A no-op outside of `on_mesh`, so that models run without any mesh.  A dimension that its mesh axes do not divide
    (one row on eight devices) stays whole.

    Raises:
      ValueError: a name that `RULES` does not know, or two names that want the same mesh axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh, "activation", strict=False))


def platform() -> str:
    """What is traced now is for "cpu", "gpu" or "tpu": the devices of the mesh of `on_mesh`, which may be one that is
    only compiled for (`jax.experimental.topologies`); without a mesh, the default device."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()  # (not every version of JAX tells the platform itself)
    return "tpu" if kind.startswith("tpu") else "cpu" if kind == "cpu" else "gpu"


def on_tpu() -> bool:
    """Whether that is a TPU."""
    return platform() == "tpu"


def replicated(mesh: Mesh) -> NamedSharding:
    """Layout of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Layout of a batch: the first dimension is split, whatever follows is whole."""
    return NamedSharding(mesh, PartitionSpec(dict(RULES)["batch"]))


def batch_shards(mesh: Mesh | None) -> int:
    """Into how many parts a batch is split; without a mesh, one."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in dict(RULES)["batch"])


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


def partition_spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    where: str = "array",
    *,
    strict: bool = True,
) -> PartitionSpec:
    """Layout of one array from the names of its dimensions.

    Args:
      names: a logical name, or None for a whole dimension, per dimension.
      shape: its shape.
      mesh: supplies the axis sizes.
      where: name of the array, for messages.
      strict: refuse to keep a dimension of a large array whole because its mesh axes do not divide it.

    Raises:
      ValueError: a name that `RULES` does not know, a wrong number of names, or two that want the same mesh axis.
      MeshError: a large array with a dimension that its mesh axes do not divide.
    """
    rules = dict(RULES)
    if len(names) != len(shape):
        raise ValueError(f"{where}: {len(names)} logical names {tuple(names)} for an array of shape {tuple(shape)}.")
    unknown = [name for name in names if name is not None and name not in rules]
    if unknown:
        raise ValueError(f"{where}: unknown logical name(s) {unknown}; parallel.RULES knows {sorted(rules)}.")
    spec: list[str | tuple[str, ...] | None] = []
    taken: set[str] = set()
    for name, size in zip(names, shape, strict=True):
        target = rules[name] if name is not None else None
        axes = (target,) if isinstance(target, str) else tuple(target or ())
        if taken & set(axes):
            raise ValueError(f"{where}: names {tuple(names)} put the mesh axis {taken & set(axes)} on two dimensions.")
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways:
            if strict and math.prod(shape) > MAX_UNDIVIDED_ELEMENTS:
                raise MeshError(
                    f"{where}: dimension '{name}' of size {size} cannot be split over mesh axes {axes} of size {ways}. "
                    f"Change config.mesh, or the width of the model to a multiple of {ways}."
                )
            target, axes = None, ()
        taken |= set(axes)
        spec.append(target)
    return PartitionSpec(*spec)


def shardings_of(boxed: Any, mesh: Mesh) -> Any:
    """Layouts of a tree of parameters.

    Args:
      boxed: tree of arrays or `ShapeDtypeStruct`s, boxed by `nn.with_logical_partitioning` where dimensions have
        names; unboxed leaves are replicated.
      mesh: the mesh.

    Returns:
      A tree of `NamedSharding`s with the structure of the unboxed tree.
    """

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.meta.AxisMetadata)

    def sharding(path: Any, leaf: Any) -> NamedSharding:
        if not is_box(leaf):
            return replicated(mesh)
        where = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh, where))

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_box)


def abstract(tree: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s of `tree`, with `shardings`: what a compiler or a checkpoint reader needs to know."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def describe(mesh: Mesh) -> Mapping[str, Any]:
    """One mapping for logs: axis sizes, device kind, number of hosts."""
    return {**mesh.shape, "device": mesh.devices.flat[0].device_kind, "hosts": jax.process_count()}
