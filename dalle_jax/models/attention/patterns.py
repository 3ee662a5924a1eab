"""Attention patterns over the stream "text, then image grid" (DALL-E, section 2.2 and appendix B.1, figure 11).

A pattern is one small frozen object. `mask(layout)` is the truth: which key each query may read. All that makes
it fast is derived from that mask and tested against it, forward and backward:

  * `attend` (training) splits the image into groups of queries that share their image keys: a row and the rows
    before it, or a column. One float32 softmax spans the group's image keys and the text.
  * the decode cache keeps only the image positions that a later query can still read: a ring of the last W+1
    positions for row layers, the window for convolutional ones, the grid for column ones, of which a step reads
    one column.

Deviation: none in the masks. Figure 11's convolutional corner is not settled by public code, so wrap-around at
row ends is a field (`Convolutional.wrap`).

    B batch    S = T + N sequence    T text    N = h·w image tokens    H heads    K head size
    G groups of queries    Q queries in a group    L image keys of a group or of a decode cache (`decode_cache.py`)
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models.attention.decode_cache import ColumnCache, RingCache
from dalle_jax.token_layout import TokenLayout

# Under these names `jax.checkpoint` can keep queries, keys and values of the whole stream, and what attention gives.
HEADS, ATTENDED = "heads", "attended"


class Pattern(Protocol):
    """Who reads whom, and how to do it fast."""

    def mask(self, layout: TokenLayout) -> np.ndarray:
        """The truth: bool [S, S], [query, key]."""

    def groups(self, layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
        """Image positions of each group's queries, int [G, Q], and of its keys, int [G, L] (-1: none)."""

    def group_queries(self, x: jax.Array) -> jax.Array:
        """[B, h, w, H, K] to [B, G, Q, H, K], in the order of `groups`."""

    def group_keys(self, x: jax.Array, layout: TokenLayout) -> jax.Array:
        """[B, h, w, H, K] to [B, G, L, H, K], in the order of `groups`; what stands at -1 is masked."""

    def ungroup(self, x: jax.Array, layout: TokenLayout) -> jax.Array:
        """[B, G, Q, H, K] back to [B, N, H, K]."""


class CausalPattern(Pattern, Protocol):
    """A pattern in which nobody reads what comes later: tokens can be decoded one by one."""

    def cache(self, layout: TokenLayout) -> RingCache | ColumnCache:
        """What decoding must remember of the image, and how to read it."""


def _causal_stream(layout: TokenLayout, image: np.ndarray) -> np.ndarray:
    """Causal text, every image position reads all text; `image` is the bool [N, N] part."""
    t = layout.text_length
    mask = np.zeros((layout.length, layout.length), bool)
    mask[:t, :t] = np.tril(np.ones((t, t), bool))
    mask[t:, :t] = True
    mask[t:, t:] = image
    return mask


def _offsets(layout: TokenLayout) -> np.ndarray:
    """How far before the query the key stands in raster order: int [N, N], [query, key]."""
    n = np.arange(layout.image_length)
    return n[:, None] - n[None, :]


class _RasterGroups:
    """Groups for patterns that reach back a distance in raster order: a query row, and `_rows_back` rows before it."""

    def _reach(self, layout: TokenLayout) -> int:
        raise NotImplementedError

    def _rows_back(self, layout: TokenLayout) -> int:
        return min(-(-self._reach(layout) // layout.width), layout.height - 1)

    def groups(self, layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
        back = self._rows_back(layout)
        queries = np.arange(layout.image_length).reshape(layout.height, layout.width)
        keys = np.stack([queries + (i - back) * layout.width for i in range(back + 1)], axis=1)
        return queries, np.where(keys < 0, -1, keys).reshape(layout.height, -1)

    def group_queries(self, x: jax.Array) -> jax.Array:
        return x

    def group_keys(self, x: jax.Array, layout: TokenLayout) -> jax.Array:
        b, h, w, heads, k = x.shape
        back = self._rows_back(layout)
        padded = jnp.pad(x, ((0, 0), (back, 0), (0, 0), (0, 0), (0, 0)))
        rows = [jax.lax.slice_in_dim(padded, i, i + h, axis=1) for i in range(back + 1)]
        return jnp.concatenate(rows, axis=2)

    def ungroup(self, x: jax.Array, layout: TokenLayout) -> jax.Array:
        return x.reshape(x.shape[0], layout.image_length, *x.shape[3:])

    def cache(self, layout: TokenLayout) -> RingCache:
        return _ring(self, layout, self._reach(layout))


def _ring(pattern: Pattern, layout: TokenLayout, reach: int) -> RingCache:
    """The cache of a pattern that never reads further back than `reach` image positions."""
    slots = min(reach + 1, layout.image_length)
    image = pattern.mask(layout)[layout.text_length :, layout.text_length :]
    last_row = range(layout.image_length - layout.width, layout.image_length)
    allowed = tuple(tuple(bool(p >= o and image[p, p - o]) for o in range(slots)) for p in last_row)
    return RingCache(slots, allowed)


class _OneGroup:
    """One group holds the whole image: for dense patterns, where a group per row would repeat the keys h times."""

    def groups(self, layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
        everything = np.arange(layout.image_length)[None]
        return everything, everything

    def group_queries(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], 1, -1, *x.shape[3:])

    def group_keys(self, x: jax.Array, layout: TokenLayout) -> jax.Array:
        return self.group_queries(x)

    def ungroup(self, x: jax.Array, layout: TokenLayout) -> jax.Array:
        return x.reshape(x.shape[0], layout.image_length, *x.shape[3:])


@dataclasses.dataclass(frozen=True)
class Full(_OneGroup):
    """Dense causal attention."""

    def mask(self, layout: TokenLayout) -> np.ndarray:
        return _causal_stream(layout, _offsets(layout) >= 0)

    def cache(self, layout: TokenLayout) -> RingCache:
        return _ring(self, layout, layout.image_length - 1)


@dataclasses.dataclass(frozen=True)
class Bidirectional(_OneGroup):
    """The image reads everything, the text reads the text: its states stay while the image changes (MaskGIT)."""

    def mask(self, layout: TokenLayout) -> np.ndarray:
        mask = np.ones((layout.length, layout.length), bool)
        mask[: layout.text_length, layout.text_length :] = False
        return mask


@dataclasses.dataclass(frozen=True)
class Row(_RasterGroups):
    """Itself and the W positions before it in raster order, back to the same column of the previous row (fig. 11a)."""

    def mask(self, layout: TokenLayout) -> np.ndarray:
        offsets = _offsets(layout)
        return _causal_stream(layout, (offsets >= 0) & (offsets <= layout.width))

    def _reach(self, layout: TokenLayout) -> int:
        return layout.width


@dataclasses.dataclass(frozen=True)
class Convolutional(_RasterGroups):
    """A causal kernel×kernel window around the token (fig. 11d).

    Attributes:
      kernel: odd; 11 in the paper.
      wrap: the window's sides run on across row ends, as row attention does.
    """

    kernel: int = 11
    wrap: bool = True

    def __post_init__(self):
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"A convolutional pattern's kernel is {self.kernel}; it must be odd and positive.")

    def mask(self, layout: TokenLayout) -> np.ndarray:
        half = self.kernel // 2
        row, column = np.divmod(np.arange(layout.image_length), layout.width)
        offsets = _offsets(layout)
        if self.wrap:
            steps = [dr * layout.width + dc for dr in range(half + 1) for dc in range(-half, half + 1)]
            image = np.isin(offsets, [s for s in steps if s >= 0])
        else:
            near = (np.abs(row[:, None] - row) <= half) & (np.abs(column[:, None] - column) <= half)
            image = near & (offsets >= 0)
        return _causal_stream(layout, image)

    def _reach(self, layout: TokenLayout) -> int:
        half = self.kernel // 2
        return min(half * layout.width + half, layout.image_length - 1)


@dataclasses.dataclass(frozen=True)
class Column:
    """Itself and the tokens above it in its own column."""

    def mask(self, layout: TokenLayout) -> np.ndarray:
        offsets = _offsets(layout)
        return _causal_stream(layout, (offsets >= 0) & (offsets % layout.width == 0))

    def groups(self, layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
        columns = np.arange(layout.image_length).reshape(layout.height, layout.width).T
        return columns, columns

    def group_queries(self, x: jax.Array) -> jax.Array:
        return x.swapaxes(1, 2)

    def group_keys(self, x: jax.Array, layout: TokenLayout) -> jax.Array:
        return x.swapaxes(1, 2)

    def ungroup(self, x: jax.Array, layout: TokenLayout) -> jax.Array:
        return x.swapaxes(1, 2).reshape(x.shape[0], layout.image_length, *x.shape[3:])

    def cache(self, layout: TokenLayout) -> ColumnCache:
        return ColumnCache(layout.height, layout.width)


def group_mask(pattern: Pattern, layout: TokenLayout) -> np.ndarray:
    """The image part of the pattern's mask, laid out by its groups: bool [G, Q, L]."""
    image = pattern.mask(layout)[layout.text_length :, layout.text_length :]
    queries, keys = pattern.groups(layout)
    return image[queries[:, :, None], keys[:, None, :]] & (keys[:, None, :] >= 0)


def sparse_layers(depth: int, kernel: int = 11, wrap: bool = True) -> tuple[Pattern, ...]:
    """The paper's order: row, column, row, row, and so on; layer i (from 1) is a column where (i-2) mod 4 = 0;
    the last is convolutional."""
    body = [Column() if i % 4 == 1 else Row() for i in range(depth - 1)]
    return (*body, Convolutional(kernel, wrap))


def full_layers(depth: int) -> tuple[Pattern, ...]:
    """Dense causal attention in every layer (minDALL-E)."""
    return (Full(),) * depth
