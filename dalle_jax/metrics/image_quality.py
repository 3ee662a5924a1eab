"""How close reconstructions are to their images: PSNR and SSIM.

PSNR is 10·log10(255² / mean squared error) of one image, averaged over images. SSIM is that of Wang et al. (IEEE
Transactions on Image Processing 13(4), 2004). Local means, variances and covariance are taken under a Gaussian window
of 11 x 11 pixels and σ = 1.5, at every place where the window lies inside the image, with K1 = 0.01, K2 = 0.03 and
range 255. SSIM is averaged over places, colour channels and images.

    B batch    H, W image size
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.rows import valid_rows

_RANGE = 255.0
_MAX_PSNR = 100.0  # of equal images
_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


@dataclasses.dataclass(frozen=True)
class ImageQuality:
    """Sums over images.

    Attributes:
      count: number of images.
      psnr: sum, dB.
      ssim: sum.
    """

    count: int = 0
    psnr: float = 0.0
    ssim: float = 0.0


def empty() -> ImageQuality:
    """Returns the sums over no images."""
    return ImageQuality()


def add(stats: ImageQuality, images: Any, others: Any, valid: Any = None) -> ImageQuality:
    """Adds a batch.

    Args:
      stats: the sums so far.
      images, others: uint8 [B, H, W, 3], compared one by one; numpy or JAX, sharded or not.
      valid: bool [B], rows that count, or None for all.

    Raises:
      ValueError: as `psnr` and `ssim`.
    """
    decibels, similarity = (valid_rows(of(images, others), valid).astype(np.float64) for of in (psnr, ssim))
    return merge(stats, ImageQuality(len(decibels), float(decibels.sum()), float(similarity.sum())))


def merge(a: ImageQuality, b: ImageQuality) -> ImageQuality:
    """Adds the sums over two sets of images."""
    return ImageQuality(a.count + b.count, a.psnr + b.psnr, a.ssim + b.ssim)


def compute(stats: ImageQuality) -> dict[str, float]:
    """Returns the means over images: "psnr" in dB and "ssim" in [-1, 1].

    Raises:
      DataError: no images.
    """
    if not stats.count:
        raise DataError("PSNR and SSIM need at least one image.")
    return {"psnr": stats.psnr / stats.count, "ssim": stats.ssim / stats.count}


@jax.jit
def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
    """Computes the peak signal-to-noise ratio of each image, in dB, at most 100.

    Args:
      images, others: uint8 [B, H, W, 3].

    Returns:
      float32 [B].

    Raises:
      ValueError: images of another type, or of different sizes.
    """
    _check(images, others, 1)
    error = jnp.mean(jnp.square(images.astype(jnp.float32) - others.astype(jnp.float32)), axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(error / _RANGE**2, 10 ** (-_MAX_PSNR / 10)))


@jax.jit
def ssim(images: jax.Array, others: jax.Array) -> jax.Array:
    """Computes the structural similarity of each pair of images.

    Args:
      images, others: uint8 [B, H, W, 3], H and W at least 11.

    Returns:
      float32 [B], 1 for equal images.

    Raises:
      ValueError: images of another type, of different sizes, or smaller than the window.
    """
    _check(images, others, _WINDOW)
    # Moments about the middle of the range, because half the magnitude rounds a quarter as much when squared.
    x, y = (image.astype(jnp.float32) - _RANGE / 2 for image in (images, others))
    mean_x, mean_y, xx, yy, xy = _local_mean(jnp.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = xx - mean_x**2 + yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + _RANGE / 2, mean_y + _RANGE / 2
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (variances + c2), axis=(1, 2, 3))


def _local_mean(x: jax.Array) -> jax.Array:
    """Computes weighted means under the window: [..., H, W, C] to [..., H − 10, W − 10, C]."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        size = x.shape[axis] - _WINDOW + 1
        x = sum(float(w) * jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i, w in enumerate(weights))
    return x


def _check(images: jax.Array, others: jax.Array, smallest: int) -> None:
    """Raises ValueError if the images cannot be compared."""
    shape = images.shape
    if shape != others.shape or {images.dtype, others.dtype} != {jnp.dtype(jnp.uint8)}:
        raise ValueError(
            f"The images are {images.dtype} {shape} and {others.dtype} {others.shape}; expected uint8 of one shape."
        )
    if len(shape) != 4 or shape[3] != 3 or min(shape[1:3]) < smallest:
        raise ValueError(f"The images are {shape}; expected [B, H, W, 3], H and W at least {smallest}.")
