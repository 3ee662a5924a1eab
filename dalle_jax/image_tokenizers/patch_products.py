"""A convolution as one product of matrices, for CPUs inside of control flow.

XLA's CPU backend computes the gradient of a kernel with a plain loop if the convolution stands inside `cond`, `scan` or
`while`: 35 times slower than outside (jax 0.10). Products of matrices are as fast there as elsewhere.

    B batch    H, W image    C, D channels
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.distributed.sharding import platform


def convolve(
    images: Float[ArrayLike, "B H W C"],
    kernel: Float[ArrayLike, "i j C D"],
    window_strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    **options: Any,
) -> Float[Array, "B _ _ D"]:
    """Computes `jax.lax.conv_general_dilated` of images in the order NHWC; an argument of `nn.Conv`.

    Args:
      images: float [B, H, W, C].
      kernel: float [i, j, C, D].
      window_strides: steps between windows, rows and columns.
      padding: zeros before and after, rows and columns.
      **options: further arguments of `jax.lax.conv_general_dilated`. Nothing is dilated or grouped.
    """
    if platform() != "cpu":
        return jax.lax.conv_general_dilated(images, kernel, window_strides, padding, **options)
    padded = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    height, width = kernel.shape[:2]
    rows, columns = (
        1 + (size - side) // step for size, side, step in zip(padded.shape[1:3], (height, width), window_strides)
    )
    down, across = window_strides
    windows = [
        padded[:, i : i + down * (rows - 1) + 1 : down, j : j + across * (columns - 1) + 1 : across]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(windows, axis=-1)
    return patches @ kernel.reshape(-1, kernel.shape[-1])
