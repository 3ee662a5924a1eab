"""The logit-Laplace distribution over pixels (DALL-E, appendix A.3).

Pixels are bounded, a Laplace or Gaussian density is not. The paper therefore takes a Laplace variable with location μ
and scale b and passes it through the sigmoid: a density on (0, 1). Because it has no mass at 0 and 1 themselves, pixel
values are first squeezed into [ε, 1 − ε].

    ln f(x | μ, b) = −ln(2 b x (1 − x)) − |logit x − μ| / b
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

EPSILON = 0.1


def map_pixels(images: jax.Array) -> jax.Array:
    """φ: uint8 pixels [...] to float32 in [ε, 1 − ε], same shape."""
    return (1 - 2 * EPSILON) / 255 * images.astype(jnp.float32) + EPSILON


def unmap_pixels(x: jax.Array) -> jax.Array:
    """φ⁻¹ up to the factor of 255: float [...] to [0, 1], clamped, same shape."""
    return jnp.clip((x - EPSILON) / (1 - 2 * EPSILON), 0.0, 1.0)


def log_prob(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log density in nats, elementwise.

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


def to_pixels(mean: jax.Array) -> jax.Array:
    """The picture to look at, φ⁻¹(sigmoid(μ)), in [0, 1]: the scale b is a training device only."""
    return unmap_pixels(jax.nn.sigmoid(mean))
