"""How much of the codebook is used.

A dVAE that was trained for few updates tends to use only a few codes, and its reconstructions then stop improving. Two
metrics show it. Usage is the fraction of codes that occur at all. Perplexity is exp of the entropy of the codes'
frequencies: V if all V codes are equally frequent, 1 if a single one is used.

    V vocabulary
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def count(tokens: jax.Array, vocab_size: int, valid: jax.Array | None = None) -> jax.Array:
    """Counts how often each code occurs. Counts of several batches can be added.

    Args:
      tokens: int32 [B, ...].
      vocab_size: V.
      valid: bool [B], rows that count, or None for all.

    Returns:
      float32 [V].
    """
    tokens = tokens.reshape(tokens.shape[0], -1)
    weights = jnp.ones(tokens.shape, jnp.float32) if valid is None else jnp.broadcast_to(valid[:, None], tokens.shape)
    return jnp.zeros((vocab_size,), jnp.float32).at[tokens].add(weights.astype(jnp.float32))


def perplexity(counts: jax.Array) -> jax.Array:
    """Computes exp(entropy) of the frequencies: float [V] to a scalar in [1, V]. It is 1 if nothing was counted."""
    frequencies = counts / jnp.maximum(counts.sum(), 1.0)
    return jnp.exp(jnp.sum(jax.scipy.special.entr(frequencies)))


def usage(counts: jax.Array) -> jax.Array:
    """Computes the fraction of codes that occur at least once: float [V] to a scalar in [0, 1]."""
    return jnp.mean(counts > 0, dtype=jnp.float32)
