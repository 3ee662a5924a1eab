"""Decode caches: keys or values of earlier image positions, stored and read as an attention pattern needs.

B rows    H heads    K head size    L cached positions    h, w grid
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Int


@dataclasses.dataclass(frozen=True)
class RingCache:
    """A cache of the last L image positions; position p is stored in slot p mod L.

    Attributes:
      slots: L.
      allowed: whether a query in some column attends to a distance back: w tuples of L bools.
    """

    slots: int
    allowed: tuple[tuple[bool, ...], ...]

    def init(self, batch: int, heads: int, head_dim: int, dtype: DTypeLike) -> Float[ArrayLike, "B H L K"]:
        """Creates an empty cache, zeros [B, H, L, K]."""
        return jnp.zeros((batch, heads, self.slots, head_dim), dtype)

    def write(
        self, cache: Float[ArrayLike, "B H L K"], x: Float[ArrayLike, "B H K"], position: Int[ArrayLike, ""]
    ) -> Float[ArrayLike, "B H L K"]:
        """Stores keys or values, [B, H, K], of `position`, int32 scalar."""
        return jax.lax.dynamic_update_slice_in_dim(cache, x[:, :, None], position % self.slots, axis=2)

    def read(self, cache: Float[ArrayLike, "B H L K"], position: Int[ArrayLike, ""]) -> Float[ArrayLike, "B H L K"]:
        """Returns the keys or values for a query at `position`, int32 scalar: [B, H, L, K]."""
        return cache

    def visible(self, position: Int[ArrayLike, ""]) -> Bool[Array, " L"]:
        """Returns which of them a query at `position` attends to: bool [L]."""
        back = (position - jnp.arange(self.slots)) % self.slots
        table = jnp.asarray(self.allowed)
        return jnp.where(back <= position, table[position % table.shape[0]][back], False)


@dataclasses.dataclass(frozen=True)
class ColumnCache:
    """A cache of the whole grid, stored by columns. A step reads the column of its query.

    Attributes:
      height: h, rows of the grid.
      width: w, columns of the grid.
    """

    height: int
    width: int

    def init(self, batch: int, heads: int, head_dim: int, dtype: DTypeLike) -> Float[Array, "w B H h K"]:
        """Creates an empty cache, zeros [w, B, H, h, K]; each column is contiguous."""
        return jnp.zeros((self.width, batch, heads, self.height, head_dim), dtype)

    def write(
        self, cache: Float[ArrayLike, "w B H h K"], x: Float[ArrayLike, "B H K"], position: Int[ArrayLike, ""]
    ) -> Float[Array, "w B H h K"]:
        """Stores keys or values, [B, H, K], of `position`, int32 scalar."""
        row, column = position // self.width, position % self.width
        return jax.lax.dynamic_update_slice(cache, x[None, :, :, None], (column, 0, 0, row, 0))

    def read(self, cache: Float[ArrayLike, "w B H h K"], position: Int[ArrayLike, ""]) -> Float[Array, "B H h K"]:
        """Returns the keys or values in the column of `position`, int32 scalar: [B, H, h, K]."""
        return jax.lax.dynamic_index_in_dim(cache, position % self.width, axis=0, keepdims=False)

    def visible(self, position: Int[ArrayLike, ""]) -> Bool[Array, " h"]:
        """Returns which rows of the column are at or above `position`: bool [h]."""
        return jnp.arange(self.height) <= position // self.width
