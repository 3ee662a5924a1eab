"""The device mesh, and how named dimensions are laid out on it.

Every parameter and many activations name their dimensions ("embed", "heads", "batch", ...) beside their initializer.
One table, `RULES`, says which mesh axes each name is split over; nothing else in the package knows about devices:

    data     copies of the model, each with a part of the batch
    fsdp     as data, and the parameters are split over it too (gathered layer by layer when used)
    tensor   one matrix product split over several devices (heads, hidden units, vocabulary)

`jax.jit` with these shardings inserts the communication.  One device is the same code with a 1x1x1 mesh.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dalle_jax.errors import MeshError
from dalle_jax.pytree import leaf_path

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


# A dimension that its mesh axes do not divide is kept whole in arrays up to this many elements (three input channels,
# a bias); in a larger array that would quietly cost memory on every device, so it is an error.
MAX_UNDIVIDED_ELEMENTS = 2**20


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
        where = leaf_path(path)
        return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh, where))

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_box)


def abstract(tree: Any, shardings: Any) -> Any:
    """`ShapeDtypeStruct`s of `tree`, with `shardings`: what a compiler or a checkpoint reader needs to know."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
