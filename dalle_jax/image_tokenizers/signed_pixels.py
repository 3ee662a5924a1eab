"""Maps between uint8 pixels and floats in [-1, 1], the scale of the vector-quantised tokenizers."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, UInt8


def to_signed(images: UInt8[ArrayLike, "*axes"]) -> Float[ArrayLike, "*axes"]:
    """Maps uint8 pixels [...] to float32 [...] in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def from_signed(pixels: Float[ArrayLike, "*axes"]) -> Float[Array, "*axes"]:
    """Maps pixels of about [-1, 1] to [0, 1], and clips them."""
    return jnp.clip(pixels / 2 + 0.5, 0.0, 1.0)
