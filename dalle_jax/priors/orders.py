"""Orders in which the cells of the token grid are visited: raster, random and Halton.

B rows    h, w grid    N = h·w cells
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from dalle_jax.token_layout import TokenLayout

NAMES = ("raster", "random", "halton")


def cells(name: str, keys: Key[Array, " B"], layout: TokenLayout) -> Int[Array, "B N"]:
    """Returns the order of each row: which cell is visited first, second, and so on.

    Args:
      name: one of `NAMES`.
      keys: one key per row, [B]. A random order depends on the key of its row only.
      layout: layout of the token stream.

    Returns:
      Cells, int32 [B, N].
    """
    if name == "random":
        draw = lambda key: jax.random.permutation(jax.random.fold_in(key, layout.image_length), layout.image_length)
        return jax.vmap(draw)(keys).astype(jnp.int32)
    order = halton(layout.height, layout.width) if name == "halton" else np.arange(layout.image_length)
    return jnp.broadcast_to(jnp.asarray(order, jnp.int32), (keys.shape[0], layout.image_length))


def mixed(key: Key[Array, ""], rows: int, layout: TokenLayout, share: Float[ArrayLike, ""]) -> Int[Array, "B N"]:
    """Draws random orders for a share of the rows and raster order for the others.

    Args:
      key: scalar key.
      rows: B.
      layout: layout of the token stream.
      share: probability that a row has a random order, float32 scalar.

    Returns:
      Cells, int32 [B, N].
    """
    order_key, which_key = jax.random.split(key)
    scattered = cells("random", jax.random.split(order_key, rows), layout)
    random = jax.random.uniform(which_key, (rows, 1)) < share
    return jnp.where(random, scattered, jnp.arange(layout.image_length, dtype=jnp.int32)[None])


def given_first(cells: Int[ArrayLike, "B N"], known: Bool[ArrayLike, "_ N"]) -> Int[Array, "B N"]:
    """Moves known cells to the front of their order.

    Args:
      cells: orders, int32 [B, N].
      known: whether a cell is known, in raster order, bool [B, N] or [1, N].

    Returns:
      Orders, int32 [B, N].
    """
    later = ~jnp.take_along_axis(jnp.broadcast_to(known, cells.shape), cells, axis=1)
    return jnp.take_along_axis(cells, jnp.argsort(later, axis=1, stable=True), axis=1)


def to_raster(tokens: Int[ArrayLike, "B N"], cells: Int[ArrayLike, "B N"]) -> Int[Array, "B N"]:
    """Sorts tokens that are listed in the order of `cells` into raster order, int32 [B, N]."""
    return jnp.take_along_axis(tokens, jnp.argsort(cells, axis=1), axis=1)


@functools.cache
def halton(height: int, width: int) -> np.ndarray:
    """Returns the cells of a grid in the order in which the Halton sequence (bases 2 and 3) enters them: int [h·w]."""
    found: dict[int, None] = {}
    start, block = 1, 4 * height * width
    while len(found) < height * width:
        index = np.arange(start, start + block)
        row, column = np.floor(_radical_inverse(index, 2) * height), np.floor(_radical_inverse(index, 3) * width)
        found |= dict.fromkeys((row * width + column).astype(int).tolist())
        start += block
    return np.array(list(found))


def _radical_inverse(index: np.ndarray, base: int) -> np.ndarray:
    """Mirrors the digits of `index` at the radix point: numbers in [0, 1)."""
    result, scale = np.zeros(index.shape), 1.0
    while index.any():
        scale /= base
        index, digit = np.divmod(index, base)
        result += digit * scale
    return result
