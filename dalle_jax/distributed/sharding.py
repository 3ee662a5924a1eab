"""Layouts of arrays on the device mesh, from the names of their dimensions.

Every parameter and many activations name their dimensions ("embed", "heads", "batch", …) next to their initializer.
The table `RULES` maps each name to the mesh axes that split it:

    data     copies of the model, each with a part of the batch
    fsdp     splits the batch as `data` does, and the parameters too, which are gathered layer by layer
    tensor   splits single matrix products: heads, hidden units, vocabulary

`jax.jit` inserts the communication for these shardings. A single device runs the same code on a 1x1x1 mesh.
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
from dalle_jax.pytree import PyTree, leaf_path

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


# A dimension that its mesh axes do not divide stays whole in arrays of up to this many elements, such as a bias. In a
# larger array it is an error, because it would silently cost memory on every device.
MAX_UNDIVIDED_ELEMENTS = 2**20
_SPARSE_CORES = ("TPU v5", "TPU v5p", "TPU v6 lite", "TPU v6e")  # two names of each kind; v5e has none


@contextlib.contextmanager
def on_mesh(mesh: Mesh) -> Iterator[Mesh]:
    """Context in which `constrain` and linen's own constraints apply to `mesh`. Outside they are no-ops."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        yield mesh


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the layout of an activation.

    A no-op outside of `on_mesh`, so that models run without a mesh. A dimension that its mesh axes do not divide, such
    as one row on eight devices, stays whole.

    Args:
      x: the activation.
      *names: a logical name per dimension, or None for a dimension that stays whole.

    Returns:
      `x` with that layout.

    Raises:
      ValueError: a name is not in `RULES`, or two names use the same mesh axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, mesh, "activation", strict=False))


def platform() -> str:
    """Returns the platform that the current trace is for: "cpu", "gpu" or "tpu".

    It is the platform of the mesh of `on_mesh`, also if that mesh exists only for the compiler
    (`jax.experimental.topologies`). Without a mesh it is the platform of the default device (`jax.default_device`).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        chosen = jax.config.jax_default_device
        return getattr(chosen, "platform", chosen) or jax.default_backend()
    kind = device.device_kind.lower()  # not every version of JAX has the platform here
    return "tpu" if kind.startswith("tpu") else "cpu" if kind == "cpu" else "gpu"


def on_tpu() -> bool:
    """Returns whether `platform` is a TPU."""
    return platform() == "tpu"


def has_sparse_cores(device_kind: str) -> bool:
    """Returns whether a kind of device is a TPU whose SparseCores exchange arrays while the chip computes."""
    return device_kind in _SPARSE_CORES


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the layout of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the layout of a batch: the first dimension is split, the others stay whole."""
    return NamedSharding(mesh, PartitionSpec(dict(RULES)["batch"]))


def batch_shards(mesh: Mesh | None) -> int:
    """Returns the number of parts that a batch is split into, 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in dict(RULES)["batch"])


def partition_spec(
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    where: str = "array",
    *,
    strict: bool = True,
) -> PartitionSpec:
    """Maps the named dimensions of an array to mesh axes.

    Args:
      names: a logical name per dimension, or None for a dimension that stays whole.
      shape: shape of the array.
      mesh: supplies the axis sizes.
      where: name of the array, for messages.
      strict: raise if a large array has a dimension that its mesh axes do not divide. Otherwise it stays whole.

    Returns:
      The partition spec.

    Raises:
      ValueError: a name is not in `RULES`, the number of names is wrong, or two names use the same mesh axis.
      MeshError: see `strict`.
    """
    rules = dict(RULES)
    if len(names) != len(shape):
        raise ValueError(f"{where}: {len(names)} logical names {tuple(names)} for an array of shape {tuple(shape)}.")
    unknown = [name for name in names if name is not None and name not in rules]
    if unknown:
        raise ValueError(f"{where}: unknown logical name(s) {unknown}; distributed.sharding.RULES has {sorted(rules)}.")
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


def shardings_of(boxed: PyTree, mesh: Mesh) -> PyTree:
    """Returns the layouts of a tree of parameters.

    Args:
      boxed: tree of arrays or `ShapeDtypeStruct`s. `nn.with_logical_partitioning` boxes those with named dimensions.
        Unboxed leaves are replicated.
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


def abstract(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns `tree` as `ShapeDtypeStruct`s with `shardings`, for a compiler or a checkpoint reader."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)
