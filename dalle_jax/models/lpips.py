"""LPIPS: the distance of two images in the features of VGG-16 (arXiv 1801.03924, section 3, version 0.1 of its code).

    images → VGG-16 → features of five stages → unit length per position → squared differences
           → non-negative weights per channel → mean over positions → sum over stages

The weights are the users' own files (`pretrained/lpips.py`). Nothing of it is trained here.

    B batch    H, W image    C channels of a stage
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.pytree import PyTree

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels of the convolutions
SMALLEST_SIDE = 16  # pixels: the last stage then has one position
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in [-1, 1], as published
_SMALLEST_LENGTH = 1e-10


class LPIPS(nn.Module):
    """The distance, with the parameters "stage_i_conv_j" of VGG-16 and "weights_i" of the stages."""

    @nn.compact
    def __call__(self, first: Float[ArrayLike, "B H W 3"], second: Float[ArrayLike, "B H W 3"]) -> Float[Array, " B"]:
        """Computes the distance of each image to its counterpart, float32 [B], from pixels in [-1, 1]."""
        layers = [
            [nn.Conv(width, (3, 3), name=f"stage_{stage}_conv_{i}") for i, width in enumerate(widths)]
            for stage, widths in enumerate(STAGES)
        ]
        total = jnp.zeros(len(first))
        # Each image apart, because one of the two needs no gradient in a training.
        for stage, (a, b) in enumerate(zip(_features(layers, first), _features(layers, second))):
            weights = self.param(f"weights_{stage}", nn.initializers.ones, (STAGES[stage][-1],))
            total += jnp.mean((a - b) ** 2 @ weights, axis=(1, 2))
        return total


def _features(layers: Sequence[Sequence[nn.Module]], pixels: Float[ArrayLike, "B H W 3"]) -> list[jax.Array]:
    """Returns the features of each stage with length 1 at each position, float32 [B, H', W', C]."""
    x, found = (pixels - jnp.array(_SHIFT)[None, None, None]) / jnp.array(_SCALE)[None, None, None], []
    for stage, convolutions in enumerate(layers):
        x = nn.max_pool(x, (2, 2), (2, 2)) if stage else x
        for convolution in convolutions:
            x = nn.relu(convolution(x))
        found.append(_unit(x))
    return found


def _unit(x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W C"]:
    """Scales each position's features to length 1. Features of length 0 stay, with a gradient of 0."""
    squares = jnp.sum(x**2, axis=-1, keepdims=True)
    safe = jnp.where(squares > 0, squares, 1.0)
    return jnp.where(squares > 0, x / (jnp.sqrt(safe) + _SMALLEST_LENGTH), 0.0)


def distance(
    params: PyTree, first: Float[ArrayLike, "B H W 3"], second: Float[ArrayLike, "B H W 3"]
) -> Float[Array, " B"]:
    """Computes LPIPS of pixels in [-1, 1]: float32 [B, H, W, 3] twice to float32 [B]."""
    return LPIPS().apply({"params": params}, first, second)


def flops(image_size: int) -> float:
    """Counts the forward pass of one square image, a multiplication as two. Its gradient costs as much again."""
    total, inputs = 0.0, 3
    for stage, widths in enumerate(STAGES):
        for width in widths:
            total += 2 * (image_size // 2**stage) ** 2 * 9 * inputs * width
            inputs = width
    return total
