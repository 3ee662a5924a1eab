"""What the priors' losses are made of, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle_jax.token_layout import TokenLayout


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-ln softmax(logits)[targets]. [..., V] and int32 [...] to float32 [...].

    Picks by comparison, not by gather: the gather's gradient is a scatter over all logits.
    """
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    picked = jnp.where(classes == targets[..., None], logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def uniform_cross_entropy(logits: jax.Array) -> jax.Array:
    """The mean of -ln softmax(logits) over the vocabulary: [..., V] to float32 [...]."""
    return jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)


def mean_over(values: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean of two arrays of one shape; 0 where all weights are 0."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1)


def drop_captions(key: jax.Array, text: jax.Array, rate: float, layout: TokenLayout) -> tuple[jax.Array, jax.Array]:
    """Empties a share of the captions, for guidance: int32 [B, T] to the same, and bool [B], which were emptied."""
    dropped = jax.random.bernoulli(key, rate, (text.shape[0], 1))
    return jnp.where(dropped, jnp.asarray(layout.null_text())[None], text), dropped[:, 0]
