"""Gaussian blur of images, for FID and Inception score by blur radius (DALL-E, section 3.1 and figure 9).

Real and generated images are blurred alike before features are extracted. Fine detail, which a dVAE cannot reproduce,
then counts for less. The paper gives radii (0, 1, 2, 4, 8) and no definition. Here, as in Pillow, the radius is the
standard deviation in pixels of the image as given (256 x 256 in the paper). Radius 0 leaves the image unchanged. Pillow
approximates by box filters; this filter is Gaussian up to four standard deviations. The border pixel is repeated beyond
the border.

    B batch    H, W image size
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

RADII = (0, 1, 2, 4, 8)  # the paper's


@jax.jit(static_argnames="radius")
def gaussian_blur(images: jax.Array, radius: float) -> jax.Array:
    """Blurs images.

    Args:
      images: uint8 [B, H, W, 3].
      radius: standard deviation in pixels, 0 or more.

    Returns:
      uint8 [B, H, W, 3], rounded.

    Raises:
      ValueError: images of another type or shape, or a negative radius.
    """
    if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"The images are {images.dtype} {images.shape}; expected uint8 [B, H, W, 3].")
    if not 0 <= radius < math.inf:
        raise ValueError(f"A blur of radius {radius}: expected 0 or more pixels.")
    if radius == 0:
        return images
    rows, columns = (_blur_matrix(size, radius) for size in images.shape[1:3])
    # Two matrix products, whatever the length of the filter, because accelerators are fastest at them.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    blurred = product("ph,bhwc->bpwc", rows, images.astype(jnp.float32))
    blurred = product("qw,bpwc->bpqc", columns, blurred)
    return jnp.floor(blurred + 0.5).astype(jnp.uint8)


def _blur_matrix(size: int, radius: float) -> np.ndarray:
    """Returns the matrix that blurs along one axis, float32 [size, size]; its rows sum to 1."""
    reach = math.ceil(4 * radius)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * radius**2))
    weights /= weights.sum()
    matrix = np.zeros((size, size))
    places = np.arange(size)
    for offset, weight in zip(offsets, weights):
        np.add.at(matrix, (places, np.clip(places + offset, 0, size - 1)), weight)
    return matrix.astype(np.float32)
