"""The CLIP score: how well pictures suit their captions (Hessel et al., arXiv 2104.08718).

The mean over pictures of 100 · max(cos(picture, caption), 0). Which CLIP gave the cosines is part of the result: the
scores of two networks do not compare, and the network that chose the pictures (reranking) is not an impartial judge.

    B batch
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.hosts import local_rows


@dataclasses.dataclass(frozen=True)
class CosineStatistics:
    """Sums over pictures.

    Attributes:
      count: how many.
      total: sum of max(cosine, 0).
    """

    count: int = 0
    total: float = 0.0


def empty() -> CosineStatistics:
    """Sums over no pictures."""
    return CosineStatistics()


def add(stats: CosineStatistics, cosines: Any, valid: Any = None) -> CosineStatistics:
    """Adds a batch.

    Args:
      stats: so far.
      cosines: float [B] in [-1, 1], as `ClipScorer.score` gives them; numpy or JAX, sharded or not.
      valid: bool [B], rows that count. None: all.

    Raises:
      ValueError: numbers that are no cosines.
    """
    rows = local_rows(cosines, valid).astype(np.float64)
    if rows.ndim != 1 or not (np.abs(rows) <= 1 + 1e-3).all():
        raise ValueError(f"Expected cosines, [B] numbers in [-1, 1]; given {rows.shape}, {rows[:3]}…")
    return merge(stats, CosineStatistics(len(rows), float(np.maximum(rows, 0).sum())))


def merge(a: CosineStatistics, b: CosineStatistics) -> CosineStatistics:
    """Sums over both sets of pictures."""
    return CosineStatistics(a.count + b.count, a.total + b.total)


def compute(stats: CosineStatistics) -> dict[str, float]:
    """{"clip_score": 0 to 100}.

    Raises:
      DataError: there are no pictures.
    """
    if not stats.count:
        raise DataError("A CLIP score of no pictures.")
    return {"clip_score": 100 * stats.total / stats.count}
