"""Masks of image patches, with an exact number of masked patches.

"blocks" is BEiT's blockwise masking (arXiv 2106.08254, algorithm 1): rectangles until enough patches are masked. Each
has an area from `smallest` to the number that is still missing, and an aspect ratio between 0.3 and 1 / 0.3, uniform in
its logarithm. In the paper the last rectangle may mask a few patches less or more. Here it is cut, in raster order, so
that every image has the same number. "random" draws patches one by one (SimMIM, MAE).

    B rows    N = h·w patches
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

MASKS = ("blocks", "random")
_ASPECT = math.log(0.3)
_BLOCKS = 32  # rectangles that are drawn; more are hardly ever needed


def draw_masks(
    kind: str, key: Key[Array, ""], rows: int, grid: tuple[int, int], count: int, smallest: int
) -> Bool[Array, "B N"]:
    """Draws the masked patches of each row.

    Args:
      kind: one of `MASKS`.
      key: scalar key.
      rows: B.
      grid: h and w.
      count: number of masked patches, in [1, N].
      smallest: the smallest area of a block, in patches.

    Returns:
      bool [B, N], true for `count` patches of each row, in raster order.
    """
    length = grid[0] * grid[1]
    if kind == "random":
        order = jax.random.uniform(key, (rows, length))
    else:
        draw = functools.partial(_first_blocks, grid=grid, count=count, smallest=smallest)
        order = jax.vmap(draw)(jax.random.split(key, rows))
    return jnp.argsort(jnp.argsort(order, axis=1), axis=1) < count  # sorting is stable: equal ones in raster order


def _first_blocks(key: Key[Array, ""], grid: tuple[int, int], count: int, smallest: int) -> Int[Array, " N"]:
    """Returns the number of the first block that covers each patch, `_BLOCKS` if none does: int32 [N]."""
    height, width = grid
    row, column = jnp.divmod(jnp.arange(height * width), width)

    def add(first: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        number, key = step
        area_key, aspect_key, top_key, left_key = jax.random.split(key, 4)
        missing = count - jnp.sum(first < _BLOCKS)
        area = jax.random.uniform(area_key, (), minval=smallest, maxval=jnp.maximum(missing, smallest + 1))
        aspect = jnp.exp(jax.random.uniform(aspect_key, (), minval=_ASPECT, maxval=-_ASPECT))
        high = jnp.clip(jnp.round(jnp.sqrt(area * aspect)), 1, height)
        wide = jnp.clip(jnp.round(jnp.sqrt(area / aspect)), 1, width)
        top = jnp.floor(jax.random.uniform(top_key) * (height - high + 1))
        left = jnp.floor(jax.random.uniform(left_key) * (width - wide + 1))
        inside = (row >= top) & (row < top + high) & (column >= left) & (column < left + wide)
        return jnp.where(inside & (missing > 0), jnp.minimum(first, number), first), None

    start = jnp.full(height * width, _BLOCKS, jnp.int32)
    steps = jnp.arange(_BLOCKS, dtype=jnp.int32), jax.random.split(key, _BLOCKS)
    first, _ = jax.lax.scan(add, start, steps)
    return first
