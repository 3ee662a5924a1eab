"""Applies a compiled function of fixed batch size to any number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.distributed.rows import over_rows
from dalle_jax.distributed.sharding import batch_shards
from dalle_jax.pytree import PyTree


def up_to_multiple(count: int, of: int) -> int:
    """Rounds `count` up to a multiple of `of`."""
    return -(-count // of) * of


def batches(count: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Splits `count` rows into batches of `size`. The last row is repeated to fill the last batch.

    Yields:
      Row indices, int [size], and a mask, bool [size], that is false for repeated rows.
    """
    for start in range(0, count, size):
        places = np.arange(start, start + size)
        yield np.minimum(places, count - 1), places < count


def in_chunks(function: Callable[[Any], PyTree], rows: np.ndarray, size: int, mesh: Mesh | None = None) -> PyTree:
    """Applies `function` to all rows, `size` at a time, which bounds the memory and compiles once.

    Args:
      function: maps [size, ...] to a tree of arrays [size, ...], each row alone.
      rows: [B, ...] with B at least 1. The last row fills the last chunk.
      size: rows of a chunk. On a mesh it is rounded up to a multiple of the batch shards.
      mesh: splits each chunk over its devices, see `over_rows`.

    Returns:
      The tree of numpy arrays [B, ...].
    """
    size = up_to_multiple(size, batch_shards(mesh))
    parts = [
        jax.tree.map(np.asarray, over_rows(mesh, function, rows[places])) for places, _ in batches(len(rows), size)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *parts)
