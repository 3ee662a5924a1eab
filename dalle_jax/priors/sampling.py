"""From logits to tokens: temperature, top-k, top-p, guidance, and one key for each row.

Both filters search for their threshold bit by bit instead of sorting: 32 passes over the logits, exact, with k and
p free to change without compiling anew. Tokens tied with the last one kept are kept.

    B rows    V vocabulary
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the same order as the float32 `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = bits >> 31
    return jnp.where(sign == 1, ~bits, bits | jnp.uint32(1 << 31))


def _keep_at_least(x: jax.Array, weights: jax.Array, enough: jax.Array) -> jax.Array:
    """The largest `x` whose weights together reach `enough`, as a bool mask [B, V]."""
    bits = _ordered_bits(x)

    def refine(i, threshold):
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.where(bits >= higher, weights, 0).sum(-1, keepdims=True) >= enough
        return jnp.where(reached, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, refine, jnp.zeros((*x.shape[:-1], 1), jnp.uint32))
    return bits >= threshold


def filter_logits(logits: jax.Array, *, top_k: jax.Array | None = None, top_p: jax.Array | None = None) -> jax.Array:
    """Sets what is filtered out to -inf.

    Args:
      logits: float32 [B, V].
      top_k: keep the k largest of each row (all, where k ≥ V).
      top_p: then keep the smallest set of the largest whose probability reaches p.

    Returns:
      float32 [B, V].
    """
    if top_k is not None:
        k = jnp.clip(jnp.asarray(top_k, jnp.float32), 1, logits.shape[-1])
        logits = jnp.where(_keep_at_least(logits, jnp.ones_like(logits), k), logits, -jnp.inf)
    if top_p is not None:
        # A whole float32 sum of probabilities may fall a few ulps short of 1: p = 1 must not drop anything real.
        p = jnp.minimum(jnp.asarray(top_p, jnp.float32), 1 - 1e-6)
        logits = jnp.where(_keep_at_least(logits, jax.nn.softmax(logits), p), logits, -jnp.inf)
    return logits


def guide(conditional: jax.Array, null: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance of logits: (1 + s)·conditional - s·null (Muse, section 2.7)."""
    return (1 + scale) * conditional - scale * null


def draw(logits: jax.Array, keys: jax.Array, temperature: jax.Array) -> jax.Array:
    """One token a row, each from its own key; temperature 0 takes the largest logit.

    Args:
      logits: float32 [B, V].
      keys: [B] keys.
      temperature: float32 [].

    Returns:
      int32 [B].
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    scores = logits + temperature * noise
    # The first of the largest, as argmax gives it, in two plain reductions: half the time of XLA's on a CPU.
    classes = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where(scores < scores.max(-1, keepdims=True), scores.shape[-1], classes).min(-1)
