"""How close reconstructions are to their pictures: PSNR and SSIM.

PSNR is 10·log10(255² / mean squared error) of one picture, averaged over pictures. SSIM is that of Wang et al. (IEEE
Transactions on Image Processing 13(4), 2004): local means, variances and covariance under a Gaussian window of 11 x 11
pixels and σ = 1.5, at every place where the window lies inside the picture, K1 = 0.01, K2 = 0.03, range 255; on each
colour channel, averaged over places, channels and pictures.

    B batch    H, W picture
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.hosts import local_rows

_RANGE = 255.0
_MAX_PSNR = 100.0  # of pictures that are equal
_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


@dataclasses.dataclass(frozen=True)
class PictureStatistics:
    """Sums over pictures.

    Attributes:
      count: how many.
      psnr: sum, dB.
      ssim: sum.
    """

    count: int = 0
    psnr: float = 0.0
    ssim: float = 0.0


def empty() -> PictureStatistics:
    """Sums over no pictures."""
    return PictureStatistics()


def add(stats: PictureStatistics, images: Any, others: Any, valid: Any = None) -> PictureStatistics:
    """Adds a batch.

    Args:
      stats: so far.
      images, others: uint8 [B, H, W, 3], compared one by one; numpy or JAX, sharded or not.
      valid: bool [B], rows that count. None: all.

    Raises:
      ValueError: as `psnr` and `ssim`.
    """
    decibels, similarity = (local_rows(of(images, others), valid).astype(np.float64) for of in (psnr, ssim))
    return merge(stats, PictureStatistics(len(decibels), float(decibels.sum()), float(similarity.sum())))


def merge(a: PictureStatistics, b: PictureStatistics) -> PictureStatistics:
    """Sums over both sets of pictures."""
    return PictureStatistics(a.count + b.count, a.psnr + b.psnr, a.ssim + b.ssim)


def compute(stats: PictureStatistics) -> dict[str, float]:
    """Averages over pictures: "psnr" in dB and "ssim" in [-1, 1].

    Raises:
      DataError: there are none.
    """
    if not stats.count:
        raise DataError("PSNR and SSIM of no pictures.")
    return {"psnr": stats.psnr / stats.count, "ssim": stats.ssim / stats.count}


@jax.jit
def psnr(images: jax.Array, others: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio of each picture, in dB, at most 100.

    Args:
      images, others: uint8 [B, H, W, 3].

    Returns:
      float32 [B].

    Raises:
      ValueError: pictures of another kind, or of two sizes.
    """
    _check(images, others, 1)
    error = jnp.mean(jnp.square(images.astype(jnp.float32) - others.astype(jnp.float32)), axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(error / _RANGE**2, 10 ** (-_MAX_PSNR / 10)))


@jax.jit
def ssim(images: jax.Array, others: jax.Array) -> jax.Array:
    """Structural similarity of each picture.

    Args:
      images, others: uint8 [B, H, W, 3], H and W at least 11.

    Returns:
      float32 [B], 1 where the two are equal.

    Raises:
      ValueError: pictures of another kind, of two sizes, or smaller than the window.
    """
    _check(images, others, _WINDOW)
    # Moments about the middle of the range: half the numbers, a quarter of the squares' rounding.
    x, y = (image.astype(jnp.float32) - _RANGE / 2 for image in (images, others))
    mean_x, mean_y, xx, yy, xy = _local_mean(jnp.stack([x, y, x * x, y * y, x * y]))
    variances, covariance = xx - mean_x**2 + yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + _RANGE / 2, mean_y + _RANGE / 2
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return jnp.mean(luminance * (2 * covariance + c2) / (variances + c2), axis=(1, 2, 3))


def _local_mean(x: jax.Array) -> jax.Array:
    """Weighted means under the window: [..., H, W, C] to [..., H − 10, W − 10, C]."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        size = x.shape[axis] - _WINDOW + 1
        x = sum(float(w) * jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i, w in enumerate(weights))
    return x


def _check(images: jax.Array, others: jax.Array, smallest: int) -> None:
    """Raises ValueError where the two cannot be compared."""
    shape = images.shape
    if shape != others.shape or {images.dtype, others.dtype} != {jnp.dtype(jnp.uint8)}:
        raise ValueError(
            f"Pictures are {images.dtype} {shape} and {others.dtype} {others.shape}; expected uint8 of one shape."
        )
    if len(shape) != 4 or shape[3] != 3 or min(shape[1:3]) < smallest:
        raise ValueError(f"Pictures are {shape}; expected [B, H, W, 3], H and W at least {smallest}.")
