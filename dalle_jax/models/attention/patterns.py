"""Attention patterns over the stream "text, then image grid" (DALL-E, section 2.2 and appendix B.1, figure 11).

A pattern is a small frozen object. Its method `mask` defines which keys each query attends to. Two more descriptions
are derived from the mask and tested against it:

* Groups split the image into queries that share their image keys, such as a row and the rows before it, or a column.
  `xla.py` attends group by group. `splash.py` sorts the stream by groups.
* The decode cache keeps the image positions that later queries still attend to (`decode_cache.py`). Row layers keep
  the last w+1 positions, convolutional layers their window. Column layers keep the grid, and a step reads one column.

The masks are those of the paper. Figure 11 does not show how the convolutional window behaves at row ends, and no
public code of the authors does. `Convolutional.wrap` and `Toroidal` are the possible behaviours.

    B batch    S = T + N sequence    T text    N = h·w image tokens    h, w grid    H heads    K head size
    G groups of queries    Q queries in a group    L image keys of a group
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dalle_jax.models.attention.decode_cache import ColumnCache, RingCache
from dalle_jax.token_layout import TokenLayout

# Names under which `jax.checkpoint` can keep queries, keys and values of the whole stream, and the output of attention.
HEADS, ATTENDED = "heads", "attended"


Mask = Bool[np.ndarray, "S S"]  # [query, key]
ImageMask = Bool[np.ndarray, "N N"]  # [query, key]
Groups = tuple[Int[np.ndarray, "G Q"], Int[np.ndarray, "G L"]]
Grid = Float[Array, "B h w H K"]
GroupedQueries = Float[Array, "B G Q H K"]
GroupedKeys = Float[Array, "B G L H K"]
RasterQueries = Float[Array, "B N H K"]


@runtime_checkable
class Pattern(Protocol):
    """Which keys each query attends to, and how the image splits into groups."""

    def mask(self, layout: TokenLayout) -> Mask:
        """Returns whether a query attends to a key: bool [S, S], [query, key]."""

    def groups(self, layout: TokenLayout) -> Groups:
        """Returns the image positions of each group's queries, int [G, Q], and keys, int [G, L]; -1 for no key."""

    def group_queries(self, x: Grid) -> GroupedQueries:
        """Sorts queries by groups: [B, h, w, H, K] to [B, G, Q, H, K]."""

    def group_keys(self, x: Grid, layout: TokenLayout) -> GroupedKeys:
        """Sorts keys or values by groups: [B, h, w, H, K] to [B, G, L, H, K]. Entries of no key are arbitrary."""

    def ungroup(self, x: GroupedQueries, layout: TokenLayout) -> RasterQueries:
        """Sorts queries back into raster order: [B, G, Q, H, K] to [B, N, H, K]."""


@runtime_checkable
class CausalPattern(Pattern, Protocol):
    """A pattern in which no query attends to a later key, so that tokens can be decoded one by one."""

    def cache(self, layout: TokenLayout) -> RingCache | ColumnCache:
        """Returns the decode cache of the image positions."""


def _causal_stream(layout: TokenLayout, image: ImageMask) -> Mask:
    """Builds the mask of the stream from its image part: text is causal, and the image attends to all text."""
    t = layout.prefix_length
    mask = np.zeros((layout.length, layout.length), bool)
    mask[:t, :t] = np.tril(np.ones((t, t), bool))
    mask[t:, :t] = True
    mask[t:, t:] = image
    return mask


def _offsets(layout: TokenLayout) -> Int[np.ndarray, "N N"]:
    """Returns the raster distance from the key forward to the query: int [N, N], [query, key]."""
    n = np.arange(layout.image_length)
    return n[:, None] - n[None, :]


class _RasterGroups:
    """Groups of patterns with a limited reach in raster order: queries of one row, keys of it and of rows before it."""

    def _reach(self, layout: TokenLayout) -> int:
        """Returns the largest raster distance between a query and its keys."""
        raise NotImplementedError

    def _rows_back(self, layout: TokenLayout) -> int:
        """Returns how many rows before the query's row hold keys."""
        return min(-(-self._reach(layout) // layout.width), layout.height - 1)

    def groups(self, layout: TokenLayout) -> Groups:
        back = self._rows_back(layout)
        queries = np.arange(layout.image_length).reshape(layout.height, layout.width)
        keys = np.stack([queries + (i - back) * layout.width for i in range(back + 1)], axis=1)
        return queries, np.where(keys < 0, -1, keys).reshape(layout.height, -1)

    def group_queries(self, x: Grid) -> GroupedQueries:
        return x

    def group_keys(self, x: Grid, layout: TokenLayout) -> GroupedKeys:
        b, h, w, heads, k = x.shape
        back = self._rows_back(layout)
        padded = jnp.pad(x, ((0, 0), (back, 0), (0, 0), (0, 0), (0, 0)))
        rows = [jax.lax.slice_in_dim(padded, i, i + h, axis=1) for i in range(back + 1)]
        return jnp.concatenate(rows, axis=2)

    def ungroup(self, x: GroupedQueries, layout: TokenLayout) -> RasterQueries:
        return x.reshape(x.shape[0], layout.image_length, *x.shape[3:])

    def cache(self, layout: TokenLayout) -> RingCache:
        return _ring(self, layout, self._reach(layout))


def _ring(pattern: Pattern, layout: TokenLayout, reach: int) -> RingCache:
    """Builds the cache of a pattern that attends at most `reach` image positions back."""
    slots = min(reach + 1, layout.image_length)
    image = pattern.mask(layout)[layout.prefix_length :, layout.prefix_length :]
    last_row = range(layout.image_length - layout.width, layout.image_length)
    allowed = tuple(tuple(bool(p >= o and image[p, p - o]) for o in range(slots)) for p in last_row)
    return RingCache(slots, allowed)


def _check_kernel(kernel: int) -> None:
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"A convolutional pattern's kernel is {kernel}; it must be odd and positive.")


class _OneGroup:
    """One group with the whole image, for dense patterns. A group per row would repeat the keys h times."""

    def groups(self, layout: TokenLayout) -> Groups:
        everything = np.arange(layout.image_length)[None]
        return everything, everything

    def group_queries(self, x: Grid) -> GroupedQueries:
        return x.reshape(x.shape[0], 1, -1, *x.shape[3:])

    def group_keys(self, x: Grid, layout: TokenLayout) -> GroupedKeys:
        return self.group_queries(x)

    def ungroup(self, x: GroupedQueries, layout: TokenLayout) -> RasterQueries:
        return x.reshape(x.shape[0], layout.image_length, *x.shape[3:])


@dataclasses.dataclass(frozen=True)
class Full(_OneGroup):
    """Dense causal attention."""

    def mask(self, layout: TokenLayout) -> Mask:
        return _causal_stream(layout, _offsets(layout) >= 0)

    def cache(self, layout: TokenLayout) -> RingCache:
        return _ring(self, layout, layout.image_length - 1)


@dataclasses.dataclass(frozen=True)
class Toroidal(_OneGroup):
    """A convolutional window that continues on the opposite side of the grid, without later positions (ru-DALL-E v2).

    Attributes:
      kernel: side of the window, odd.
    """

    kernel: int = 11

    def __post_init__(self):
        _check_kernel(self.kernel)

    def mask(self, layout: TokenLayout) -> Mask:
        half = self.kernel // 2
        row, column = np.divmod(np.arange(layout.image_length), layout.width)

        def near(place: np.ndarray, size: int) -> np.ndarray:
            distance = (place[:, None] - place) % size
            return np.minimum(distance, size - distance) <= half

        image = near(row, layout.height) & near(column, layout.width) & (_offsets(layout) >= 0)
        return _causal_stream(layout, image)

    def cache(self, layout: TokenLayout) -> RingCache:
        return _ring(self, layout, layout.image_length - 1)


@dataclasses.dataclass(frozen=True)
class Bidirectional(_OneGroup):
    """Dense attention of the image to everything, for MaskGIT.

    Attributes:
      text_reads_image: whether the text attends to the image, too. If not, its states do not depend on the image, so
        that decoding computes them once.
    """

    text_reads_image: bool = False

    def mask(self, layout: TokenLayout) -> Mask:
        mask = np.ones((layout.length, layout.length), bool)
        mask[: layout.prefix_length, layout.prefix_length :] = self.text_reads_image
        return mask


@dataclasses.dataclass(frozen=True)
class Row(_RasterGroups):
    """Attention to the position itself and the w positions before it in raster order (figure 11a).

    The farthest of them is in the same column of the previous row.
    """

    def mask(self, layout: TokenLayout) -> Mask:
        offsets = _offsets(layout)
        return _causal_stream(layout, (offsets >= 0) & (offsets <= layout.width))

    def _reach(self, layout: TokenLayout) -> int:
        return layout.width


@dataclasses.dataclass(frozen=True)
class Convolutional(_RasterGroups):
    """Attention to the causal half of a window around the position (figure 11d).

    Attributes:
      kernel: side of the window, odd; 11 in the paper.
      wrap: whether the window continues across row ends, as row attention does.
    """

    kernel: int = 11
    wrap: bool = True

    def __post_init__(self):
        _check_kernel(self.kernel)

    def mask(self, layout: TokenLayout) -> Mask:
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
    """Attention to the position itself and the positions above it in the same column (figure 11b)."""

    def mask(self, layout: TokenLayout) -> Mask:
        offsets = _offsets(layout)
        return _causal_stream(layout, (offsets >= 0) & (offsets % layout.width == 0))

    def groups(self, layout: TokenLayout) -> Groups:
        columns = np.arange(layout.image_length).reshape(layout.height, layout.width).T
        return columns, columns

    def group_queries(self, x: Grid) -> GroupedQueries:
        return x.swapaxes(1, 2)

    def group_keys(self, x: Grid, layout: TokenLayout) -> GroupedKeys:
        return x.swapaxes(1, 2)

    def ungroup(self, x: GroupedQueries, layout: TokenLayout) -> RasterQueries:
        return x.swapaxes(1, 2).reshape(x.shape[0], layout.image_length, *x.shape[3:])

    def cache(self, layout: TokenLayout) -> ColumnCache:
        return ColumnCache(layout.height, layout.width)


def group_mask(pattern: Pattern, layout: TokenLayout) -> Bool[np.ndarray, "G Q L"]:
    """Returns the image part of a pattern's mask, sorted by groups: bool [G, Q, L]."""
    image = pattern.mask(layout)[layout.prefix_length :, layout.prefix_length :]
    queries, keys = pattern.groups(layout)
    return image[queries[:, :, None], keys[:, None, :]] & (keys[:, None, :] >= 0)


def sparse_layers(depth: int, kernel: int = 11, wrap: bool = True, torus: bool = False) -> tuple[Pattern, ...]:
    """Returns the paper's order of patterns: row, column, row, row, and so on, and at last convolutional.

    Layer i, counted from 1, is a column layer if (i-2) mod 4 = 0.

    Args:
      depth: number of layers.
      kernel: see `Convolutional`.
      wrap: see `Convolutional`.
      torus: whether the last pattern is `Toroidal` instead.
    """
    body = [Column() if i % 4 == 1 else Row() for i in range(depth - 1)]
    return (*body, Toroidal(kernel) if torus else Convolutional(kernel, wrap))


def full_layers(depth: int) -> tuple[Pattern, ...]:
    """Returns dense causal attention for every layer, as in minDALL-E."""
    return (Full(),) * depth
