"""Rotary positions (arXiv 2104.09864) of the stream "text, then image grid".

S = T + N sequence    T text    H heads    K head size
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.token_layout import TokenLayout


def rotary_angles(layout: TokenLayout, head_dim: int) -> np.ndarray:
    """Computes the rotation angles of each position, one quarter of K for each of two coordinates.

    The coordinates of text are (position, 0). Those of the image are (T + row, column), so that no text position shares
    its first coordinate with an image row.

    Args:
      layout: layout of the token stream.
      head_dim: K, a multiple of 4.

    Returns:
      float32 [S, K/2].
    """
    text = np.stack([np.arange(layout.prefix_length), np.zeros(layout.prefix_length)], -1)
    rows, columns = np.divmod(np.arange(layout.image_length), layout.width)
    image = np.stack([layout.prefix_length + rows, columns], -1)
    rates = 10000.0 ** (-np.arange(head_dim // 4) / (head_dim // 4))
    angles = np.concatenate([text, image])[:, :, None] * rates
    return angles.reshape(layout.length, head_dim // 2).astype(np.float32)


def rotate(x: Float[ArrayLike, "*axes S H K"], angles: Float[ArrayLike, "S _"]) -> Float[Array, "*axes S H K"]:
    """Rotates queries or keys; channel k is paired with channel k + K/2.

    Args:
      x: [..., S, H, K].
      angles: float32 [S, K/2].

    Returns:
      [..., S, H, K] in the dtype of x.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    shape = (1,) * (a.ndim - 3) + cos.shape[:1] + (1,) + cos.shape[2:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
