"""Decode caches: keys or values of earlier image positions, stored and read as an attention pattern needs.

A step reads all slots of a cache. A cache of all image positions is mostly empty at first, so a long one grows in
stages, and each stage is a loop over a larger cache.

B rows    H heads    K head size    L cached positions    h, w grid    N image tokens
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Int

from dalle_jax.pytree import PyTree

_STAGES = 4
_SHORT = 256  # slots of the largest cache that has all of them from the start; each stage is compiled for itself


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


Caches = list[tuple[Float[Array, "..."], Float[Array, "..."]]]  # keys and values of each layer


def stages(
    stores: Sequence[RingCache | ColumnCache], positions: int, first: int = 0
) -> list[tuple[int, int, int | None]]:
    """Splits a decode loop into stages, so that long caches grow.

    A cache grows if it has more than 256 slots, one for each position. The loop is then split into four. The caches of
    the first loop have a fourth of the slots, and those of the last one have all. This reads 63% of the slots.

    Args:
      stores: how each layer's cache is stored.
      positions: the end of the positions.
      first: the first position, in the first fourth of the slots.

    Returns:
      First position, position after the last one, and slots of the growing caches; None if no cache grows.
    """
    growing = [each.slots for each in stores if _grows(each, positions)]
    if not growing:
        return [(first, positions, None)]
    ends = [-(-max(growing) * (stage + 1) // _STAGES) for stage in range(_STAGES)]
    return [(begin, min(end, positions), end) for begin, end in itertools.pairwise([first, *ends])]


def for_stage(caches: Caches, stores: Sequence[RingCache | ColumnCache], positions: int, slots: int | None) -> Caches:
    """Returns the caches with the slots of a stage. Arguments as in `stages`."""
    return [
        tuple(_with_slots(x, slots) for x in cache) if _grows(store, positions) else cache
        for cache, store in zip(caches, stores)
    ]


def _grows(store: RingCache | ColumnCache, positions: int) -> bool:
    return isinstance(store, RingCache) and store.slots > max(_SHORT, positions - 1)


def scan_in_stages(
    body: Callable[[tuple[PyTree, Caches], Array], tuple[tuple[PyTree, Caches], PyTree]],
    start: tuple[PyTree, Caches],
    stores: Sequence[RingCache | ColumnCache],
    positions: int,
    first: int = 0,
) -> tuple[tuple[PyTree, Caches], PyTree]:
    """Runs a decode loop as `jax.lax.scan` does, over the positions first, first + 1, …, in the stages of `stages`.

    Args:
      body: maps ((state, caches), position) to ((state, caches), outputs). It accepts caches with fewer slots, as long
        as they have one for the position.
      start: the state, and caches with all slots, which are empty from the first position on.
      stores: how each layer's cache is stored.
      positions: the end of the positions.
      first: the first position, in the first fourth of the slots.

    Returns:
      The state and the caches after the last position, and the outputs of all positions, stacked.
    """
    parts = stages(stores, positions, first)
    if len(parts) == 1:
        return jax.lax.scan(body, start, jnp.arange(first, positions))
    (state, caches), outputs = start, []
    for begin, end, slots in parts:
        caches = for_stage(caches, stores, positions, slots)
        (state, caches), found = jax.lax.scan(body, (state, caches), jnp.arange(begin, end))
        outputs.append(found)
    return (state, caches), jax.tree.map(lambda *parts: jnp.concatenate(parts), *outputs)


def _with_slots(cache: Float[ArrayLike, "B H _ K"], slots: int) -> Float[Array, "B H _ K"]:
    """Cuts off empty slots, or adds some."""
    missing = slots - cache.shape[2]
    return jnp.pad(cache, ((0, 0), (0, 0), (0, missing), (0, 0))) if missing > 0 else cache[:, :, :slots]
