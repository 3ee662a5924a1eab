"""What is written for each device by itself, with its exchanges: products of split parameters, and kernels.

Everything else is written for the whole mesh and left to the compiler (`parallel.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

from dalle_jax.distributed.sharding import partition_spec


def contract(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    kernel: jax.Array,
    names: Sequence[str | None],
    contracted: Sequence[int],
) -> jax.Array:
    """The product of activations and a parameter that is split over devices.

    Where the parameter is split along `fsdp`, each device puts it together, multiplies its own rows, and sends its part
    of the gradient to the devices that hold the parts: one all-gather and one reduce-scatter, as in ZeRO-3 (arXiv
    1910.02054) and FSDP (arXiv 2304.11277). Left to itself, the TPU compiler multiplies part by part around the ring of
    devices: on a pod each part is narrow, and every partial product is written to memory and read again.

    Elsewhere, and where the rows cannot be split, the compiler decides. Without rematerialisation the whole kernel is
    kept until the backward pass (any other `remat` of a trunk than "none" gathers it again).

    Args:
      product: of one device's (x, kernel); contracts the last dimensions of x with `contracted` of the kernel, and
        gives [B, ..., outputs] with the kernel's other dimensions in their order.
      x: [B, ..., inputs].
      kernel: in the dtype of the product.
      names: logical names of the kernel's dimensions.
      contracted: which of them are contracted.

    Returns:
      [B, ..., outputs].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["fsdp"] == 1:
        return product(x, kernel)
    spec = partition_spec(names, kernel.shape, mesh, "kernel", strict=False)
    rows = partition_spec(("batch", *[None] * (x.ndim - 1)), x.shape, mesh, "activation", strict=False)[0]
    # Axes of one device exchange nothing, and are left out.
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

    def local(x: jax.Array, part: jax.Array) -> jax.Array:
        # Each device has rows and a kernel of its own: said here, so that gradients are added up over `data` last, when
        # they are scattered.
        y = product(own(x, seen), _whole(own(part, have), spec.index("fsdp")))
        return jax.lax.psum(y, "tensor") if any(inner) else y

    in_specs = PartitionSpec(*batch, *inner), PartitionSpec(*spec)
    return jax.shard_map(local, in_specs=in_specs, out_specs=PartitionSpec(*batch, *outer))(x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(part: jax.Array, axis: int) -> jax.Array:
    """Inside of `shard_map`: an array put together along `axis` from the parts that lie along `fsdp`."""
    return jax.lax.all_gather(part, "fsdp", axis=axis, tiled=True)


def _scattered(axis: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # With an axis of its own for the parts the TPU compiler scatters in any case; within one axis only where parts are
    # a multiple of eight rows, and of the 12-billion model's 3,968 that is never so: it exchanges twice as much there.
    parts = jax.lax.axis_size("fsdp")
    shape = (*gradient.shape[:axis], parts, gradient.shape[axis] // parts, *gradient.shape[axis + 1 :])
    return (jax.lax.psum_scatter(gradient.reshape(shape), "fsdp", scatter_dimension=axis),)


_whole.defvjp(lambda part, axis: (_whole(part, axis), None), _scattered)


def on_each_device(function: Callable[..., jax.Array], names: Sequence[str | None], *inputs: jax.Array) -> jax.Array:
    """Calls a function on each device's part of its inputs: for what the compiler cannot split by itself (kernels).

    Without a mesh it is called on the whole.

    Args:
      function: takes arrays and gives one; what it computes for a part must not depend on the others.
      names: the logical names of the dimensions of each input, and of the result. A dimension that its mesh axes do
        not divide stays whole: each of their devices computes all of it.
      *inputs: arrays of one rank.

    Returns:
      What `function` gives, put together; of the first input's shape.

    Raises:
      ValueError: as `constrain`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*inputs)
    first, *others = (partition_spec(names, x.shape, mesh, "activation", strict=False) for x in inputs)
    return jax.shard_map(function, in_specs=(first, *others), out_specs=first, check_vma=False)(*inputs)
