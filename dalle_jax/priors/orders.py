"""Orders in which a grid's cells are visited: raster, random, Halton.

B rows    N = h·w cells
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.token_layout import TokenLayout

NAMES = ("raster", "random", "halton")


def cells(name: str, keys: jax.Array, layout: TokenLayout) -> jax.Array:
    """The order of each row, int32 [B, N]: the cell visited first, second, and so on.

    Args:
      name: one of `NAMES`.
      keys: [B] keys; a random order depends on its row's alone.
      layout: of the grid.
    """
    if name == "random":
        draw = lambda key: jax.random.permutation(jax.random.fold_in(key, layout.image_length), layout.image_length)
        return jax.vmap(draw)(keys).astype(jnp.int32)
    order = halton(layout.height, layout.width) if name == "halton" else np.arange(layout.image_length)
    return jnp.broadcast_to(jnp.asarray(order, jnp.int32), (keys.shape[0], layout.image_length))


def mixed(key: jax.Array, rows: int, layout: TokenLayout, share: jax.Array) -> jax.Array:
    """Random orders for a share of the rows, raster order for the others: int32 [B, N]."""
    order_key, which_key = jax.random.split(key)
    scattered = cells("random", jax.random.split(order_key, rows), layout)
    random = jax.random.uniform(which_key, (rows, 1)) < share
    return jnp.where(random, scattered, jnp.arange(layout.image_length, dtype=jnp.int32)[None])


def given_first(cells: jax.Array, known: jax.Array) -> jax.Array:
    """The same orders with the known cells, bool [B, N] by place, in front: int32 [B, N]."""
    later = ~jnp.take_along_axis(jnp.broadcast_to(known, cells.shape), cells, axis=1)
    return jnp.take_along_axis(cells, jnp.argsort(later, axis=1, stable=True), axis=1)


def to_raster(tokens: jax.Array, cells: jax.Array) -> jax.Array:
    """Tokens listed in the order of `cells`, put where they belong: int32 [B, N]."""
    return jnp.take_along_axis(tokens, jnp.argsort(cells, axis=1), axis=1)


@functools.cache
def halton(height: int, width: int) -> np.ndarray:
    """The cells of a grid in the order in which the Halton sequence of bases 2 and 3 first enters them: int [h·w]."""
    found: dict[int, None] = {}
    start, block = 1, 4 * height * width
    while len(found) < height * width:
        index = np.arange(start, start + block)
        row, column = np.floor(_radical_inverse(index, 2) * height), np.floor(_radical_inverse(index, 3) * width)
        found |= dict.fromkeys((row * width + column).astype(int).tolist())
        start += block
    return np.array(list(found))


def _radical_inverse(index: np.ndarray, base: int) -> np.ndarray:
    """The digits of `index` mirrored at the point, in [0, 1)."""
    result, scale = np.zeros(index.shape), 1.0
    while index.any():
        scale /= base
        index, digit = np.divmod(index, base)
        result += digit * scale
    return result
