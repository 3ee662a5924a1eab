"""Counts the floating-point operations of CLIP's towers from their sizes. A multiplication counts as two operations."""

from __future__ import annotations

import math

from dalle_jax.models.clip import CLIPOptions


def patches(o: CLIPOptions) -> float:
    """Counts the patch embedding of one image."""
    return 2 * o.patches * 3 * o.patch**2 * o.image_width


def image_tower(o: CLIPOptions) -> float:
    """Counts the image tower for one image."""
    with_class = o.image_readout == "class_token"
    seen, read = o.patches + with_class, 1 if with_class else o.patches
    projection = 2 * read * o.image_width * o.embed_dim
    return patches(o) + _tower(seen, seen**2, o.image_width, o.image_depth, o.image_mlp) + projection


def text_tower(o: CLIPOptions) -> float:
    """Counts the text tower for one caption."""
    projection = 2 * o.text_width * o.embed_dim
    return _tower(o.text_length, math.comb(o.text_length + 1, 2), o.text_width, o.text_depth) + projection


def _tower(positions: int, pairs: int, width: int, depth: int, hidden: int | None = None) -> float:
    return depth * (2 * positions * (4 * width**2 + 2 * width * (hidden or 4 * width)) + 4 * width * pairs)
