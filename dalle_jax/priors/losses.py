"""Terms of the priors' losses, in float32.

B rows    T text    V classes
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Num

from dalle_jax.token_layout import TokenLayout


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


def drop_captions(
    key: Key[Array, ""], text: Int[ArrayLike, "B T"], rate: float, layout: TokenLayout
) -> tuple[Int[Array, "B T"], Bool[Array, " B"]]:
    """Replaces a random share of the captions by the empty caption, as training for guidance needs.

    Args:
      key: scalar key.
      text: padded captions, int32 [B, T].
      rate: probability that a caption is dropped.
      layout: layout of the token stream.

    Returns:
      Captions, int32 [B, T], and which of them were dropped, bool [B].
    """
    dropped = jax.random.bernoulli(key, rate, (text.shape[0], 1))
    return jnp.where(dropped, jnp.asarray(layout.null_text())[None], text), dropped[:, 0]
