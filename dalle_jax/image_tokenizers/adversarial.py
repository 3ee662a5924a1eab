"""Losses of the two players of a VQGAN: the generator, which is the tokenizer, and the discriminator.

B batch    H, W image    h, w grid of patches
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

Logits = Float[ArrayLike, "B h w"]
# "hinge" and "vanilla" are those of taming transformers, whose generators both minimise −mean(logits).
# "non_saturating" is that of StyleGAN2 and MaskGIT's tokenizer.
LOSSES = ("hinge", "vanilla", "non_saturating")
_SMALLEST_NORM, _LARGEST_WEIGHT = 1e-4, 1e4


def discriminator_loss(kind: str, real: Logits, fake: Logits) -> Float[Array, ""]:
    """Computes the discriminator's loss from the logits of real images and of reconstructions.

    Args:
      kind: a member of `LOSSES`.
      real, fake: logits, float32 [B, h, w].
    """
    if kind == "hinge":
        return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))
    both = jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))
    return 0.5 * both if kind == "vanilla" else both


def generator_loss(kind: str, fake: Logits) -> Float[Array, ""]:
    """Computes the generator's loss from the logits of reconstructions, float32 [B, h, w]."""
    return jnp.mean(jax.nn.softplus(-fake)) if kind == "non_saturating" else -jnp.mean(fake)


def adaptive_weight(fidelity: Float[ArrayLike, "*axes"], adversarial: Float[ArrayLike, "*axes"]) -> Float[Array, ""]:
    """Balances two losses by their gradients at the decoder's last layer (VQGAN, equation 7, as in its code).

    Args:
      fidelity: gradient of the reconstruction loss for the last kernel.
      adversarial: gradient of the generator's loss for the same kernel.

    Returns:
      ‖fidelity‖ / (‖adversarial‖ + 1e-4), at most 1e4. It has no gradient.
    """
    ratio = jnp.linalg.norm(fidelity.ravel()) / (jnp.linalg.norm(adversarial.ravel()) + _SMALLEST_NORM)
    return jax.lax.stop_gradient(jnp.minimum(ratio, _LARGEST_WEIGHT))


def r1_penalty(logits: Callable[[jax.Array], jax.Array], pixels: Float[ArrayLike, "B H W 3"]) -> Float[Array, ""]:
    """Computes the squared gradient norm of the discriminator at real images (arXiv 1801.04406, equation 9).

    Args:
      logits: the discriminator, from pixels to logits [B, h, w]. The score of an image is the mean over its patches.
      pixels: real images, float32 [B, H, W, 3] in [-1, 1].

    Returns:
      The mean over images of ‖∇ score‖².
    """
    gradients = jax.grad(lambda x: jnp.sum(jnp.mean(logits(x), axis=(1, 2))))(pixels)
    return jnp.mean(jnp.sum(gradients**2, axis=(1, 2, 3)))


def lecam_penalty(
    real: Logits, fake: Logits, average_real: Float[ArrayLike, ""], average_fake: Float[ArrayLike, ""]
) -> Float[Array, ""]:
    """Computes the LeCam regularisation (arXiv 2104.03310, equation 7), one-sided and on means, as MaskBit's code.

    It keeps the logits of each kind of image from moving past the running average of the other kind.

    Args:
      real, fake: logits of this batch, float32 [B, h, w].
      average_real, average_fake: running averages of their means, float32 scalars.
    """
    above = jax.nn.relu(jnp.mean(real) - average_fake)
    below = jax.nn.relu(average_real - jnp.mean(fake))
    return above**2 + below**2


def with_gradient(
    value: Float[ArrayLike, ""], gradient: Float[ArrayLike, "*axes"], x: Float[ArrayLike, "*axes"]
) -> Float[Array, ""]:
    """Returns `value` with a given gradient for `x`, so that a function need not be differentiated twice.

    Args:
      value: value of the function at `x`, float32 scalar.
      gradient: its gradient there. Neither of the two receives a gradient.
      x: the point, an array of any shape. Gradients reach it, and all that it depends on.
    """
    value, gradient, point = (jax.lax.stop_gradient(one) for one in (value, gradient, x))
    return value + jnp.sum(gradient * (x - point))
