"""Rotary positions (arXiv 2104.09864) over "text, then image grid": text by position, the image by row and column.

S = T + N sequence    T text    H heads    K head size
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.token_layout import TokenLayout


def rotary_angles(layout: TokenLayout, head_dim: int) -> np.ndarray:
    """Angles of each position, float32 [S, K/2]: a quarter of K for each of two coordinates.

    Text has (position, 0); the image has (T + row, column), so that a text distance never equals an image one by row.
    """
    text = np.stack([np.arange(layout.text_length), np.zeros(layout.text_length)], -1)
    rows, columns = np.divmod(np.arange(layout.image_length), layout.width)
    image = np.stack([layout.text_length + rows, columns], -1)
    rates = 10000.0 ** (-np.arange(head_dim // 4) / (head_dim // 4))
    angles = np.concatenate([text, image])[:, :, None] * rates
    return angles.reshape(layout.length, head_dim // 2).astype(np.float32)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates [..., S, H, K] by angles [S, K/2], pairing k with k + K/2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    shape = (1,) * (a.ndim - 3) + cos.shape[:1] + (1,) + cos.shape[2:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
