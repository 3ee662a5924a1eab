"""Many rows through a compiled function that takes a fixed number of them."""

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
    """`count`, or the next larger multiple."""
    return -(-count // of) * of


def batches(count: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All of `count` rows, `size` at a time; the last one repeats, so that every batch has that size.

    Yields:
      The places of the rows, int [size], and which of them count, bool [size].
    """
    for start in range(0, count, size):
        places = np.arange(start, start + size)
        yield np.minimum(places, count - 1), places < count


def in_chunks(function: Callable[[Any], PyTree], rows: np.ndarray, size: int, mesh: Mesh | None = None) -> PyTree:
    """`function` of all rows, always on `size` of them: bounds the memory, and compiles once.

    Args:
      function: [size, ...] to a tree of arrays [size, ...], row by row.
      rows: [B, ...], B at least 1. The last row fills the last chunk.
      size: of a chunk; on a mesh, the next multiple of the parts that it is split into.
      mesh: over whose devices each chunk is split, see `parallel.over_rows`.

    Returns:
      The tree, of numpy arrays [B, ...].
    """
    size = up_to_multiple(size, batch_shards(mesh))
    parts = [
        jax.tree.map(np.asarray, over_rows(mesh, function, rows[places])) for places, _ in batches(len(rows), size)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *parts)
