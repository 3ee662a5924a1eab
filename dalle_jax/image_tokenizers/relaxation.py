"""The relaxation of codes in dVAE training, Gumbel-softmax, and the KL term (DALL-E, appendix A.2).

V vocabulary
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key


def gumbel_softmax(
    logits: Float[ArrayLike, "*axes V"], key: Key[Array, ""], temperature: Float[ArrayLike, ""]
) -> Float[Array, "*axes V"]:
    """Draws a relaxed one-hot sample: softmax((logits + Gumbel noise) / τ). It is soft, not straight-through.

    Args:
      logits: float32 [..., V].
      key: scalar key.
      temperature: τ; as it approaches 0, the result approaches a one-hot sample of softmax(logits).

    Returns:
      float32 [..., V], non-negative, of sum 1.
    """
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.nn.softmax((logits + noise) / temperature, axis=-1)


def kl_to_uniform(logits: Float[ArrayLike, "*axes V"]) -> Float[Array, "*axes"]:
    """Computes KL(softmax(logits) ‖ uniform) in nats: [..., V] to [...]. It does not depend on the temperature τ."""
    log_q = jax.nn.log_softmax(logits, axis=-1)
    return jnp.sum(jnp.exp(log_q) * log_q, axis=-1) + jnp.log(jnp.float32(logits.shape[-1]))
