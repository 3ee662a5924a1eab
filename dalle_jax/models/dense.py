"""Dense layers, with one memory layout of the kernels for training and another one for decode steps.

B rows    D inputs    O outputs    R positions
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int8

from dalle_jax.distributed.per_device import contract
from dalle_jax.distributed.sharding import platform
from dalle_jax.pytree import PyTree


def rows_product(x: Float[ArrayLike, "B D"], kernel: Float[ArrayLike, "O D"], **kwargs) -> Float[Array, "B O"]:
    """Computes x · kernelᵀ as (kernel · xᵀ)ᵀ, for decode steps with one position per row.

    A decode step is limited by the time to read its kernels. In this order XLA's CPU backend reads them in place. In
    the usual order it repacks them first (twice the time at 8 rows) or uses one core (at 1 row). The barriers prevent
    XLA from reversing the order. On other devices the compiler chooses the order.

    Args:
      x: [B, D].
      kernel: [O, D].
      **kwargs: arguments of `jax.lax.dot`.

    Returns:
      [B, O].
    """
    if platform() != "cpu":
        return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())), **kwargs)
    barrier = jax.lax.optimization_barrier
    return barrier(jax.lax.dot(kernel, barrier(x.T), **kwargs)).T


@jax.custom_vjp
def product(x: Float[ArrayLike, "R D"], kernel: Float[ArrayLike, "D O"]) -> Float[Array, "R O"]:
    """Computes [R, D] times [D, O] on CPUs.

    The gradient of the kernel contracts over the rows. XLA's CPU backend transposes the left operand for that in a
    copy, so the narrower operand stands on the left.
    """
    return jax.lax.dot(x, kernel)


def _product_forward(x, kernel):
    return jax.lax.dot(x, kernel), (x, kernel)


def _product_backward(saved, dy):
    x, kernel = saved
    rows = (((0,), (0,)), ((), ()))
    barrier = jax.lax.optimization_barrier
    if x.shape[1] <= dy.shape[1]:
        dkernel = jax.lax.dot_general(x, dy, rows)
    else:
        dkernel = barrier(jax.lax.dot_general(dy, x, rows)).T
    return jax.lax.dot_general(dy, kernel, (((1,), (1,)), ((), ()))), dkernel


product.defvjp(_product_forward, _product_backward)


def _dense(x: Float[ArrayLike, ...], kernel: Float[ArrayLike, ...], axes: int) -> Float[Array, ...]:
    """Computes [..., *inputs] times [*inputs, *outputs], where `inputs` has `axes` axes."""
    if platform() != "cpu":
        # The leading axes are not merged. Merged rows have one order in memory, and 6% of the 12-billion model's step
        # on a v5p would be copies between orders.
        last = tuple(range(x.ndim - axes, x.ndim))
        return jax.lax.dot_general(x, kernel, ((last, tuple(range(axes))), ((), ())))
    leading, outputs = x.shape[: x.ndim - axes], kernel.shape[axes:]
    inputs = int(np.prod(kernel.shape[:axes]))
    return product(x.reshape(-1, inputs), kernel.reshape(inputs, -1)).reshape(*leading, *outputs)


class Dense(nn.Module):
    """A dense layer over one or more trailing axes, with logical axis names for sharding.

    Its kernel may be int8 with a parameter `kernel_scale`, float32 [*outputs], which multiplies the product; see
    `priors.decoding_weights`.

    Attributes:
      inputs: shape of the contracted axes.
      outputs: shape of the new axes.
      names: logical axis names of the kernel, [*inputs, *outputs].
      dtype: dtype of the product and the output.
      bias: logical axis names of the bias, [*outputs]; empty for no bias.
      scale: variance of the output at initialisation, for inputs of variance 1.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    names: tuple[str | None, ...]
    dtype: DTypeLike
    bias: tuple[str | None, ...] = ()
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[ArrayLike, ...], *, decode_step: bool = False) -> Float[Array, ...]:
        """Maps [..., *inputs] to [..., *outputs].

        Args:
          x: [..., *inputs]; [B, *inputs] in a decode step.
          decode_step: whether x holds one position per row; see `rows_product` and `outputs_first`.

        Returns:
          [..., *outputs].
        """
        axes = tuple(range(len(self.inputs)))
        init = nn.initializers.normal((self.scale / np.prod(self.inputs)) ** 0.5)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.names), (*self.inputs, *self.outputs))
        scale = self.get_variable("params", "kernel_scale") if self.has_variable("params", "kernel_scale") else None
        kernel, inputs = kernel if scale is not None else kernel.astype(self.dtype), int(np.prod(self.inputs))
        if decode_step:
            rows = kernel.reshape(inputs, -1).T
            if scale is not None:
                rows, x = _cast_here(rows, x, self.dtype)
            y = rows_product(x.astype(self.dtype).reshape(len(x), -1), rows).reshape(-1, *self.outputs)
        else:
            if scale is not None:
                kernel, x = _cast_here(kernel, x, self.dtype)
            y = contract(functools.partial(_dense, axes=len(axes)), x.astype(self.dtype), kernel, self.names, axes)
        if scale is not None:
            y = (y.astype(jnp.float32) * scale.reshape((1,) * (y.ndim - scale.ndim) + scale.shape)).astype(self.dtype)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.bias)
            bias = self.param("bias", zeros, self.outputs).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


def _cast_here(kernel: Int8[ArrayLike, ...], x: ArrayLike, dtype: DTypeLike) -> tuple[Array, Array]:
    """Casts a kernel where it is used.

    Otherwise a compiler moves the cast out of the loop over decoding steps, and keeps a cast copy of all kernels. CPUs
    ignore barriers when they move it, so that the kernel has to depend on x there, by a zero that only NaN makes 1.
    """
    if platform() == "cpu":
        first = x.reshape(-1)[0]
        return (kernel + (first != first).astype(jnp.int8)).astype(dtype), x
    kernel, x = jax.lax.optimization_barrier((kernel, x))
    return kernel.astype(dtype), x


def input_axes(name: str) -> int:
    """Returns the number of input axes of a trunk's dense layer: two for "out", which reads heads, else one."""
    return 2 if name == "out" else 1


def outputs_first(params: PyTree, dtype: DTypeLike) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Stores every dense kernel of a trunk as [*outputs, *inputs], the order in which `rows_product` reads it on CPUs.

    On other devices the kernels keep their shape, because products read both orders equally fast. They are only cast,
    which does nothing if they have the dtype already. Kernels in int8 are not cast.

    Args:
      params: parameters of the trunk.
      dtype: dtype of the stored kernels.

    Returns:
      The stored parameters, and a function that restores the shapes that the modules expect. Call the function inside
      the decode loop, where it costs nothing.
    """

    on_cpu = platform() == "cpu"

    def store(path, x):
        if path[-1].key != "kernel":
            return x
        x = x if x.dtype == jnp.int8 else x.astype(dtype)
        if not on_cpu:
            return x
        inputs = np.prod(x.shape[: input_axes(path[-2].key)])
        return jax.lax.optimization_barrier(x.reshape(inputs, -1).T)

    def restore(stored):
        shaped = lambda path, x, rows: rows.T.reshape(x.shape) if path[-1].key == "kernel" else rows
        return jax.tree_util.tree_map_with_path(shaped, params, stored)

    return jax.tree_util.tree_map_with_path(store, params), restore if on_cpu else lambda stored: stored
