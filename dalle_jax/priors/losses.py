"""Terms of the priors' losses, in float32.

B rows    V classes
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Num, Shaped

from dalle_jax.priors.condition import Condition, with_empty


def cross_entropy(logits: Float[ArrayLike, "*axes V"], targets: Int[ArrayLike, "*axes"]) -> Float[Array, "*axes"]:
    """Computes −ln softmax(logits)[targets].

    The logits are selected by comparison. The gradient of a gather would be a scatter over all logits.

    Args:
      logits: float32 [..., V].
      targets: classes, int32 [...].

    Returns:
      Nats, float32 [...].
    """
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    picked = jnp.where(classes == targets[..., None], logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def uniform_cross_entropy(logits: Float[ArrayLike, "*axes V"]) -> Float[Array, "*axes"]:
    """Computes the mean of −ln softmax(logits) over the classes: float32 [..., V] to [...]."""
    return jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)


def mean_over(
    values: Num[ArrayLike, "*axes"] | Bool[ArrayLike, "*axes"], weights: Num[ArrayLike, "*axes"]
) -> Float[Array, ""]:
    """Computes the weighted mean of an array, or 0 if all weights are 0.

    Args:
      values: any shape.
      weights: non-negative, of the same shape.
    """
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1)


def training_conditions(
    key: Key[Array, ""], rows: Shaped[ArrayLike, "B ..."], rate: float, condition: Condition
) -> tuple[Shaped[Array, "B ..."], Bool[Array, " B"]]:
    """Varies the conditions of a training batch as their kind asks, and replaces a random share by the empty one.

    Guidance needs the empty ones.

    Args:
      key: scalar key.
      rows: conditions, such as padded captions, int32 [B, T].
      rate: probability that a condition is dropped.
      condition: their kind.

    Returns:
      Conditions of the same shape, and which of them were dropped, bool [B].
    """
    dropped = jax.random.bernoulli(key, rate, (rows.shape[0], 1))[:, 0]
    rows = condition.vary(jax.random.fold_in(key, 1), rows)
    return with_empty(condition, rows, dropped), dropped
