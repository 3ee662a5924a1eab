"""The logit-Laplace distribution over pixels (DALL-E, appendix A.3).

Pixels are bounded; Laplace and Gaussian densities are not. The paper therefore applies the sigmoid to a Laplace
variable with location μ and scale b, which gives a density on (0, 1). It is not defined at 0 and 1, so pixels are first
mapped to [ε, 1 − ε].

    ln f(x | μ, b) = −ln(2 b x (1 − x)) − |logit x − μ| / b
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, UInt8

EPSILON = 0.1


def map_pixels(images: UInt8[ArrayLike, "*axes"]) -> Float[ArrayLike, "*axes"]:
    """Computes φ: uint8 pixels [...] to float32 [...] in [ε, 1 − ε]."""
    return (1 - 2 * EPSILON) / 255 * images.astype(jnp.float32) + EPSILON


def unmap_pixels(x: Float[ArrayLike, "*axes"]) -> Float[Array, "*axes"]:
    """Computes φ⁻¹ / 255, clipped to [0, 1]: float [...] to [...]."""
    return jnp.clip((x - EPSILON) / (1 - 2 * EPSILON), 0.0, 1.0)


def log_prob(
    x: Float[ArrayLike, "*#axes"], mean: Float[ArrayLike, "*#axes"], log_scale: Float[ArrayLike, "*#axes"]
) -> Float[Array, "*#axes"]:
    """Computes the log density of each pixel in nats.

    Args:
      x: mapped pixels in (0, 1), [...].
      mean: μ, [...].
      log_scale: ln b, [...].

    Returns:
      ln f(x | μ, b), [...].
    """
    logit = jnp.log(x) - jnp.log1p(-x)
    log_jacobian = -jnp.log(x) - jnp.log1p(-x)
    return log_jacobian - jnp.log(2.0) - log_scale - jnp.abs(logit - mean) * jnp.exp(-log_scale)


def to_pixels(mean: Float[ArrayLike, "*axes"]) -> Float[Array, "*axes"]:
    """Computes pixels φ⁻¹(sigmoid(μ)) in [0, 1]. The scale b is used in training only."""
    return unmap_pixels(jax.nn.sigmoid(mean))
