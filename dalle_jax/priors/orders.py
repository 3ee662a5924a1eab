"""Orders in which the cells of the token grid are visited: raster, random, Halton and diagonal.

B rows    h, w grid    N = h·w cells    P positions    k side of a square    K = k² - 1 neighbours
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from dalle_jax.token_layout import TokenLayout

NAMES = ("raster", "random", "halton", "diagonal")


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
    order = np.arange(layout.image_length)
    if name == "halton":
        order = halton(layout.height, layout.width)
    if name == "diagonal":
        order = np.argsort(_diagonals(layout.height, layout.width), kind="stable")
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


def shuffled_diagonals(key: Key[Array, ""], rows: int, layout: TokenLayout) -> Int[Array, "B N"]:
    """Draws diagonal orders: diagonal after diagonal, the cells of each one in random order.

    Args:
      key: scalar key.
      rows: B.
      layout: layout of the token stream.

    Returns:
      Cells, int32 [B, N].
    """
    diagonal = jnp.asarray(_diagonals(layout.height, layout.width), jnp.float32)[None]
    return jnp.argsort(diagonal + jax.random.uniform(key, (rows, layout.image_length)), axis=1).astype(jnp.int32)


def diagonal_groups(steps: int, layout: TokenLayout) -> np.ndarray:
    """Splits the diagonal order into groups of cells.

    There are h + w - 1 diagonals. More steps split the largest diagonals, and fewer steps join the smallest neighbours.

    Args:
      steps: number of groups, at most N.
      layout: layout of the token stream.

    Returns:
      The end of each group as a place of the order, after a 0: int32 [steps + 1].
    """
    sizes = np.bincount(_diagonals(layout.height, layout.width)).tolist()
    while len(sizes) < steps:
        place = int(np.argmax(sizes))
        sizes[place : place + 1] = [(sizes[place] + 1) // 2, sizes[place] // 2]
    while len(sizes) > steps:
        place = int(np.argmin(np.add(sizes[:-1], sizes[1:])))
        sizes[place : place + 2] = [sizes[place] + sizes[place + 1]]
    return np.cumsum([0, *sizes]).astype(np.int32)


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


def neighbours(
    tokens: Int[ArrayLike, "B N"],
    places: Int[ArrayLike, "B N"],
    asked: Int[ArrayLike, "B P"],
    seen: Int[ArrayLike, "#B P"],
    side: int,
    layout: TokenLayout,
) -> Int[Array, "B P K"] | None:
    """Returns the tokens around cells, as far as they are known.

    Args:
      tokens: tokens in the order in which cells are visited, int32 [B, N].
      places: the place of each cell in this order, int32 [B, N].
      asked: the cells in the middle, int32 [B, P].
      seen: number of tokens that are known for each position, the first ones of the order, int32 [B, P] or [1, P].
      side: k, odd. The K = k² - 1 neighbours lie in a square of this side, in raster order. 0 returns None.
      layout: layout of the token stream.

    Returns:
      Tokens, int32 [B, P, K]; `layout.mask_id` for a neighbour that is unknown or outside of the grid.
    """
    if not side:
        return None
    half = side // 2
    offsets = [(i, j) for i in range(-half, half + 1) for j in range(-half, half + 1) if (i, j) != (0, 0)]
    down, right = np.array(offsets, np.int32).T
    row = (asked // layout.width)[..., None] + down[None, None]
    column = (asked % layout.width)[..., None] + right[None, None]
    inside = (row >= 0) & (row < layout.height) & (column >= 0) & (column < layout.width)
    around = jnp.where(inside, row * layout.width + column, 0)  # [B, P, K]
    at = lambda x, where: jnp.take_along_axis(x, where.reshape(len(x), -1), axis=1).reshape(where.shape)
    place = at(places, around)
    return jnp.where(inside & (place < seen[..., None]), at(tokens, place), layout.mask_id)


def _diagonals(height: int, width: int) -> np.ndarray:
    """Returns the number of each cell's anti-diagonal, row + column: int [h·w]."""
    return (np.arange(height)[:, None] + np.arange(width)[None]).reshape(-1)


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
