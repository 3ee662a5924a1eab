"""Code written per device with explicit communication: products with split parameters, and kernels.

All other code is written for the whole mesh, and the compiler splits it (`sharding.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

from dalle_jax.distributed.sharding import has_sparse_cores, on_tpu, partition_spec


def contract(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    names: Sequence[str | None],
    contracted: Sequence[int],
) -> jax.Array:
    """Multiplies activations with a parameter that is split over devices.

    If the parameter is split along `fsdp`, each device gathers it, multiplies its own rows, and scatters its gradient
    back. That is one all-gather and one reduce-scatter, as in ZeRO-3 (arXiv 1910.02054) and FSDP (arXiv 2304.11277).
    The TPU compiler alone would multiply part by part around the ring of devices. On a pod each part is narrow, and
    every partial product is written to memory and read again.

    In all other cases, and if the rows cannot be split, the compiler decides. With `remat="none"` the gathered kernel
    is kept until the backward pass; every other `remat` of a trunk gathers it again.

    Args:
      product: function of (x, kernel) on one device. It contracts the last dimensions of x with the dimensions
        `contracted` of the kernel, and returns [B, ..., outputs] with the kernel's other dimensions in their order.
      x: [B, ..., inputs].
      kernel: in the dtype of the product.
      names: logical names of the kernel's dimensions.
      contracted: indices of the contracted dimensions.

    Returns:
      [B, ..., outputs].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return product(x, kernel)
    spec = partition_spec(names, kernel.shape, mesh, "kernel", strict=False)
    rows = partition_spec(("batch", *[None] * (x.ndim - 1)), x.shape, mesh, "activation", strict=False)[0]
    # Axes of size one exchange nothing and are left out.
    spec = [axis if axis and mesh.shape[axis] > 1 else None for axis in spec]
    rows = tuple(axis for axis in rows or () if mesh.shape[axis] > 1)
    if "fsdp" not in spec or not rows:
        return product(x, kernel)
    tensor = ["tensor" if axis == "tensor" else None for axis in spec]
    inner = [tensor[axis] for axis in contracted]
    outer = [tensor[axis] for axis in range(kernel.ndim) if axis not in contracted]
    batch = [rows, *[None] * (x.ndim - 1 - len(inner))]
    seen, have = {*rows, *inner} - {None}, set(spec) - {None}  # axes over which x, and the kernel, differ
    own = lambda x, axes: jax.lax.pcast(x, tuple(sorted((seen | have) - axes)), to="varying")
    # The gradient of an MLP's hidden units is fused with that of their activation. A barrier would write it to memory.
    in_turn = scatters_in_turn() and names[contracted[0]] != "mlp"

    def local(x: jax.Array, part: jax.Array) -> jax.Array:
        # Marks rows and kernel as different on each device, so that gradients are summed over `data` last, when they
        # are scattered.
        x, part = own(x, seen), own(part, have)
        if in_turn:
            x, part = _scattered_first(x, part)
        y = product(x, _whole(part, spec.index("fsdp")))
        return jax.lax.psum(y, "tensor") if any(inner) else y

    in_specs = PartitionSpec(*batch, *inner), PartitionSpec(*spec)
    return jax.shard_map(local, in_specs=in_specs, out_specs=PartitionSpec(*batch, *outer))(x, kernel)


def scatters_in_turn() -> bool:
    """Returns whether gradients should be scattered before the backward pass continues: on TPUs without SparseCores.

    There, no other work runs during a reduce-scatter. The compiler still postpones all of them to the end of a unit of
    layers, and keeps the whole gradients until then.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device is not None and on_tpu() and not has_sparse_cores(device.device_kind)


@jax.custom_vjp
def _scattered_first(x: jax.Array, part: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns its arguments. The gradient of x is complete only when that of `part` is."""
    return x, part


_scattered_first.defvjp(lambda x, part: ((x, part), None), lambda _, both: jax.lax.optimization_barrier(both))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(part: jax.Array, axis: int) -> jax.Array:
    """Gathers an array along `axis` from its parts along `fsdp`, inside `shard_map`."""
    return jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True)


def _scattered(axis: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # A separate axis for the parts makes the TPU compiler scatter in every case. Within one axis it scatters only parts
    # of a multiple of eight rows and otherwise exchanges twice as much, as with the 3,968 of the 12-billion model.
    parts = jax.lax.axis_size("fsdp")
    shape = (*gradient.shape[:axis], parts, gradient.shape[axis] // parts, *gradient.shape[axis + 1 :])
    return (jax.lax.psum_scatter(gradient.reshape(shape), "fsdp", scatter_dimension=axis),)


_whole.defvjp(lambda part, axis: (_whole(part, axis), None), _scattered)


def on_each_device(function: Callable[..., jax.Array], names: Sequence[str | None], *inputs: jax.Array) -> jax.Array:
    """Calls a function on each device's part of its inputs, for kernels, which the compiler cannot split.

    Without a mesh the function is called on the complete inputs.

    Args:
      function: maps arrays to one array. Its result for a part must not depend on the other parts.
      names: logical names of the dimensions of each input and of the result. A dimension that its mesh axes do not
        divide stays whole, and each of these devices computes all of it.
      *inputs: arrays of equal rank.

    Returns:
      The assembled results, of the shape of the first input.

    Raises:
      ValueError: see `sharding.constrain`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*inputs)
    first, *others = (partition_spec(names, x.shape, mesh, "activation", strict=False) for x in inputs)
    return jax.shard_map(function, in_specs=(first, *others), out_specs=first, check_vma=False)(*inputs)
