"""The CLIP score: how well images match their captions (Hessel et al., arXiv 2104.08718).

It is the mean over images of 100 · max(cos(image, caption), 0). The factor 100 is that of torchmetrics and of later
papers, which report percent. Hessel et al. multiply by 2.5 instead: their CLIP-S is this score divided by 40.

Scores of two different CLIPs are not comparable. The CLIP that chose the images (reranking) is biased in their favour.

    B batch
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.rows import valid_rows


@dataclasses.dataclass(frozen=True)
class CosineStatistics:
    """Sums over images.

    Attributes:
      count: number of images.
      total: sum of max(cosine, 0).
    """

    count: int = 0
    total: float = 0.0


def empty() -> CosineStatistics:
    """Returns the sums over no images."""
    return CosineStatistics()


def add(stats: CosineStatistics, cosines: Any, valid: Any = None) -> CosineStatistics:
    """Adds a batch.

    Args:
      stats: the sums so far.
      cosines: float [B] in [-1, 1], as from `ClipScorer.score`; numpy or JAX, sharded or not.
      valid: bool [B], rows that count, or None for all.

    Raises:
      ValueError: values outside [-1, 1], or not [B].
    """
    rows = valid_rows(cosines, valid).astype(np.float64)
    if rows.ndim != 1 or not (np.abs(rows) <= 1 + 1e-3).all():
        raise ValueError(f"Expected cosines, [B] numbers in [-1, 1]; given {rows.shape}, {rows[:3]}…")
    return merge(stats, CosineStatistics(len(rows), float(np.maximum(rows, 0).sum())))


def merge(a: CosineStatistics, b: CosineStatistics) -> CosineStatistics:
    """Adds the sums over two sets of images."""
    return CosineStatistics(a.count + b.count, a.total + b.total)


def compute(stats: CosineStatistics) -> dict[str, float]:
    """Returns {"clip_score": score}, 0 to 100.

    Raises:
      DataError: no images.
    """
    if not stats.count:
        raise DataError("The CLIP score needs at least one image.")
    return {"clip_score": 100 * stats.total / stats.count}
