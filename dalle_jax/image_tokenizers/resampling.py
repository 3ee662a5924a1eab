"""Changes of resolution: grids of tokens, space to depth and back, pooling, nearest-neighbour upsampling.

B batch    H, W image or grid    C channels    s factor
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.errors import ConfigError


def token_grid(image_size: int, downsample: int) -> tuple[int, int]:
    """Returns the number of rows and columns of tokens of a square image.

    Args:
      image_size: side of the image in pixels.
      downsample: side of the square of pixels that one token stands for.

    Raises:
      ConfigError: the side is not a multiple of `downsample`.
    """
    if image_size % downsample:
        raise ConfigError(
            f"The image size is {image_size} pixels; expected a multiple of {downsample}, because a token "
            f"stands for {downsample} x {downsample} pixels."
        )
    return image_size // downsample, image_size // downsample


def space_to_depth(x: Float[ArrayLike, "B H W C"], factor: int) -> Float[ArrayLike, "B _ _ _"]:
    """Turns each s x s block of pixels into the channels of one position: [B, H, W, C] to [B, H/s, W/s, s*s*C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // factor, w // factor, factor * factor * c)


def depth_to_space(x: Float[ArrayLike, "B h w _"], factor: int) -> Float[ArrayLike, "B _ _ _"]:
    """Inverts `space_to_depth`: [B, h, w, s*s*C] to [B, h*s, w*s, C]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, factor, factor, c // factor**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * factor, w * factor, c // factor**2)


def max_pool(x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B _ _ C"]:
    """Computes the maximum of each 2 x 2 block: [B, H, W, C] to [B, H/2, W/2, C]."""
    return nn.max_pool(x, (2, 2), strides=(2, 2))


def average_pool(x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B _ _ C"]:
    """Computes the mean of each 2 x 2 block: [B, H, W, C] to [B, H/2, W/2, C]."""
    return nn.avg_pool(x, (2, 2), strides=(2, 2))


def upsample(x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Repeats each position 2 x 2 times: [B, H, W, C] to [B, 2H, 2W, C]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
