"""A perceptual distance of two images by the image tower of a trained CLIP.

    images → image tower → states of each block → unit length per patch
           → squared differences → mean over patches and blocks

It has the form of LPIPS (arXiv 1801.03924, section 3) without its weights per channel, which were fitted to people's
answers. A class token is left out, because it has no place in the image.

    B images    H, W image    P patches    D width
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.models.clip import Block, CLIPOptions, ImageTower, preprocess
from dalle_jax.pytree import PyTree


def distance(
    options: CLIPOptions,
    params: PyTree,
    first: Float[ArrayLike, "B H W 3"],
    second: Float[ArrayLike, "B H W 3"],
) -> Float[Array, " B"]:
    """Computes the distance of each image to its counterpart.

    Args:
      options: of the CLIP. Images of another size are resized to its own.
      params: parameters of its image tower.
      first, second: pixels in [-1, 1], float32 [B, H, W, 3].

    Returns:
      float32 [B], in [0, 4].
    """
    pairs = zip(*(_states(options, params, pixels) for pixels in (first, second)))  # apart: one needs no gradient
    return jnp.mean(jnp.stack([jnp.mean(jnp.sum((a - b) ** 2, axis=-1), axis=-1) for a, b in pairs]), axis=0)


def _states(options: CLIPOptions, params: PyTree, pixels: Float[ArrayLike, "B H W 3"]) -> list[jax.Array]:
    """Returns the states of each block with length 1, float32 [B, P, D], from pixels in [-1, 1]."""
    images = preprocess(pixels / 2 + 0.5, options.image_size)
    _, captured = ImageTower(options).apply(
        {"params": params}, images, mutable="intermediates",
        capture_intermediates=lambda module, method: isinstance(module, Block) and method == "__call__",
    )  # fmt: skip
    blocks = [captured["intermediates"][f"block_{i}"]["__call__"][0] for i in range(options.image_depth)]
    return [_unit(states[:, -options.patches :]) for states in blocks]


def _unit(x: Float[ArrayLike, "B P D"]) -> Float[Array, "B P D"]:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)
