"""Many rows through a compiled function that takes a fixed number of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

PyTree = Any


def in_chunks(function: Callable[[np.ndarray], PyTree], rows: np.ndarray, size: int) -> PyTree:
    """`function` of all rows, always on `size` of them: bounds the memory, and compiles once.

    Args:
      function: [size, ...] to a tree of arrays [size, ...], row by row.
      rows: [B, ...], B at least 1. The last row fills the last chunk.
      size: of a chunk.

    Returns:
      The tree, of numpy arrays [B, ...].
    """
    parts = []
    for start in range(0, len(rows), size):
        chunk = np.minimum(np.arange(start, start + size), len(rows) - 1)
        parts.append(jax.tree.map(np.asarray, function(rows[chunk])))
    return jax.tree.map(lambda *x: np.concatenate(x)[: len(rows)], *parts)
