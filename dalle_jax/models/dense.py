"""Dense layers, and how their kernels lie in memory: one layout for training, another for a decode step.

B rows    D inputs
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dalle_jax.distributed.per_device import contract
from dalle_jax.distributed.sharding import platform


def rows_product(x: jax.Array, kernel: jax.Array, **kwargs) -> jax.Array:
    """One position per row: x [B, D] times a kernel stored [outputs, D], as kernel · xᵀ; gives [B, outputs].

    A decode step is bound by reading its kernels. In this order XLA's CPU backend reads them as they lie; in the usual
    one it first repacks them (twice the time at 8 rows) or stays on one core (at 1 row). The barriers keep XLA from
    turning the order around.
    """
    barrier = jax.lax.optimization_barrier
    return barrier(jax.lax.dot(kernel, barrier(x.T), **kwargs)).T


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[R, inputs] times [inputs, outputs], for CPUs.

    The kernel's gradient contracts over the rows, and for that XLA's CPU backend first copies its left operand
    transposed: here that is the narrower one of the two.
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


def _dense(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    """[..., *inputs] times [*inputs, *outputs], with so many axes of inputs."""
    if platform() != "cpu":
        # In one axis the rows could lie in memory in one order only: 6% of the 12-billion model's step on a v5p would
        # be copies from one to another.
        last = tuple(range(x.ndim - axes, x.ndim))
        return jax.lax.dot_general(x, kernel, ((last, tuple(range(axes))), ((), ())))
    leading, outputs = x.shape[: x.ndim - axes], kernel.shape[axes:]
    inputs = int(np.prod(kernel.shape[:axes]))
    return product(x.reshape(-1, inputs), kernel.reshape(inputs, -1)).reshape(*leading, *outputs)


class Dense(nn.Module):
    """A dense layer over one or more trailing axes, named for sharding. [..., *inputs] to [..., *outputs] in `dtype`.

    With `decode_step` the input is [B, *inputs], one position per row; see `rows_product` and `outputs_first`.

    Attributes:
      inputs, outputs: shapes of the contracted and of the new axes.
      names: logical axis names of the kernel, [*inputs, *outputs].
      bias: logical axis names of the bias, [*outputs]; empty for none.
      scale: variance of the output for an input of variance 1, at initialisation.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    names: tuple[str | None, ...]
    dtype: Any
    bias: tuple[str | None, ...] = ()
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, *, decode_step: bool = False) -> jax.Array:
        axes = tuple(range(len(self.inputs)))
        init = nn.initializers.normal((self.scale / np.prod(self.inputs)) ** 0.5)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, self.names), (*self.inputs, *self.outputs))
        kernel, inputs = kernel.astype(self.dtype), int(np.prod(self.inputs))
        if decode_step:
            rows = kernel.reshape(inputs, -1).T
            y = rows_product(x.astype(self.dtype).reshape(len(x), -1), rows).reshape(-1, *self.outputs)
        else:
            y = contract(functools.partial(_dense, axes=len(axes)), x.astype(self.dtype), kernel, self.names, axes)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.bias)
            bias = self.param("bias", zeros, self.outputs).astype(self.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y


def outputs_first(params, dtype):
    """Every dense kernel of the trunk laid out [*outputs, *inputs] in memory, in `dtype`, as `rows_product` reads it.

    Returns:
      The stored parameters, and a function that gives them the shapes the modules expect: call it inside the decode
      loop, where it costs nothing.
    """

    def store(path, x):
        if path[-1].key != "kernel":
            return x
        inputs = np.prod(x.shape[: 2 if path[-2].key == "out" else 1])
        return jax.lax.optimization_barrier(x.astype(dtype).reshape(inputs, -1).T)

    def restore(stored):
        shaped = lambda path, x, rows: rows.T.reshape(x.shape) if path[-1].key == "kernel" else rows
        return jax.tree_util.tree_map_with_path(shaped, params, stored)

    return jax.tree_util.tree_map_with_path(store, params), restore
