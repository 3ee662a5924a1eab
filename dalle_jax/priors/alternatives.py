"""A loss that is one of two, chosen by a traced condition, at the cost of the chosen one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Bool, Float

from dalle_jax.pytree import PyTree

Loss = Callable[..., tuple[Float[Array, ""], dict[str, Float[Array, ""]]]]


def one_of(
    first: Bool[Array, ""], one: Loss, other: Loss, params: PyTree, *args: Any
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes `one(params, *args)` if `first` is true, else `other(params, *args)`.

    It is differentiable once, with respect to the parameters, through the loss alone. The gradient of a plain
    `jax.lax.cond` keeps room for the intermediate values of both branches. On a CPU it took 1.6 times as long.

    Args:
      first: the condition, bool scalar.
      one, other: functions that return a loss, float32 scalar, and float32 scalars of the same names.
      params: parameters, float arrays.
      *args: other arguments of both functions: arrays that no gradient is needed for, or None.

    Returns:
      The loss and the scalars.
    """

    @jax.custom_vjp
    def chosen(params, first, *args):
        return jax.lax.cond(first, one, other, params, *args)

    def forward(params, first, *args):
        ways = [jax.value_and_grad(way, has_aux=True) for way in (one, other)]
        return jax.lax.cond(first, *ways, params, *args)

    def backward(grads, cotangents):
        return jax.tree.map(lambda grad: grad * cotangents[0], grads), *(None for _ in (first, *args))

    chosen.defvjp(forward, backward)
    return chosen(params, first, *args)
