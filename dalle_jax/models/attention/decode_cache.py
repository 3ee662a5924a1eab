"""What decoding remembers of the image, sized and read by the attention pattern.

B rows    H heads    K head size    L positions kept    h/w grid
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RingCache:
    """The last `slots` image positions; position p lives in slot p mod slots.

    Attributes:
      slots: L.
      allowed: for each column and distance back, may it be read: w tuples of L bools.
    """

    slots: int
    allowed: tuple[tuple[bool, ...], ...]

    def init(self, batch: int, heads: int, head_dim: int, dtype) -> jax.Array:
        """Zeros [B, H, L, K]."""
        return jnp.zeros((batch, heads, self.slots, head_dim), dtype)

    def write(self, cache: jax.Array, x: jax.Array, position: jax.Array) -> jax.Array:
        """Puts `x`, [B, H, K], at `position`, int32 []."""
        return jax.lax.dynamic_update_slice_in_dim(cache, x[:, :, None], position % self.slots, axis=2)

    def read(self, cache: jax.Array, position: jax.Array) -> jax.Array:
        """The keys or values a query at `position` may have to read: [B, H, L, K]."""
        return cache

    def visible(self, position: jax.Array) -> jax.Array:
        """Which of them it may read: bool [L]."""
        back = (position - jnp.arange(self.slots)) % self.slots
        table = jnp.asarray(self.allowed)
        return jnp.where(back <= position, table[position % table.shape[0]][back], False)


@dataclasses.dataclass(frozen=True)
class ColumnCache:
    """The whole grid, stored column by column, of which a step reads the query's own column."""

    height: int
    width: int

    def init(self, batch: int, heads: int, head_dim: int, dtype) -> jax.Array:
        """Zeros [w, B, H, h, K]: one column is contiguous."""
        return jnp.zeros((self.width, batch, heads, self.height, head_dim), dtype)

    def write(self, cache: jax.Array, x: jax.Array, position: jax.Array) -> jax.Array:
        """Puts `x`, [B, H, K], at `position`, int32 []."""
        row, column = position // self.width, position % self.width
        return jax.lax.dynamic_update_slice(cache, x[None, :, :, None], (column, 0, 0, row, 0))

    def read(self, cache: jax.Array, position: jax.Array) -> jax.Array:
        """The query's column, [B, H, h, K]."""
        return jax.lax.dynamic_index_in_dim(cache, position % self.width, axis=0, keepdims=False)

    def visible(self, position: jax.Array) -> jax.Array:
        """Which of its rows are at or above the query's: bool [h]."""
        return jnp.arange(self.height) <= position // self.width
