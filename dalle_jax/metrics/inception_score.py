"""The Inception score (Salimans et al., arXiv 1606.03498): exp of the mean KL(p(y|x) ‖ p(y)), over ten splits.

The score is computed on each of S consecutive parts of the N images, and reported as mean and standard deviation over
the parts. Split i holds the images from i·N//S to (i+1)·N//S − 1. The score depends on the order of images, so that
every image is added with its place in the whole. In the same order it equals torch-fidelity's score with
`samples_shuffle=False`; by default that package shuffles first.

Only three sums are kept per split, Σ p, Σ p·ln p and the count, because

    mean KL = (Σ Σ_y p ln p) / n − Σ_y q ln q,    q = Σ p / n

N images therefore need as much memory as one, and the order of batches does not matter. The logits are without the
bias of the last layer, as in the original code.

    B batch    C classes    S splits    N images in all
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.rows import valid_rows


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreStatistics:
    """Sums over the images of each split.

    Attributes:
      total: N, number of images in all.
      counts: int64 [S], number of images added.
      probabilities: float64 [S, C], sum of p(y|x).
      negative_entropies: float64 [S], sum of Σ_y p ln p, nats.
    """

    total: int
    counts: np.ndarray
    probabilities: np.ndarray
    negative_entropies: np.ndarray

    @property
    def bounds(self) -> np.ndarray:
        """Place of the first image of each split, and N: int64 [S + 1]."""
        splits = len(self.counts)
        return np.arange(splits + 1) * self.total // splits


def empty(total: int, splits: int = 10, classes: int = 1008) -> ScoreStatistics:
    """Returns the sums over no images.

    Args:
      total: N.
      splits: S.
      classes: C.

    Raises:
      DataError: fewer images than splits.
    """
    if not 1 <= splits <= total:
        raise DataError(
            f"An Inception score of {total} images over {splits} splits: expected at least one image in each split."
        )
    return ScoreStatistics(total, np.zeros(splits, np.int64), np.zeros((splits, classes)), np.zeros(splits))


def add(stats: ScoreStatistics, logits: Any, places: Any, valid: Any = None) -> ScoreStatistics:
    """Adds a batch.

    Args:
      stats: the sums so far.
      logits: float [B, C], without the last layer's bias; numpy or JAX, sharded or not.
      places: int [B], the place of each image in the whole, 0 to N − 1.
      valid: bool [B], rows that count, or None for all.

    Raises:
      ValueError: logits of another width or not finite, or places outside [0, N).
    """
    rows, places = valid_rows(logits, valid).astype(np.float64), valid_rows(places, valid)
    if rows.shape != (len(places), stats.probabilities.shape[1]):
        raise ValueError(f"Logits are {rows.shape}; expected [{len(places)}, {stats.probabilities.shape[1]}].")
    if not np.isfinite(rows).all():
        raise ValueError("Some of the logits are not finite.")
    if len(places) and not 0 <= places.min() <= places.max() < stats.total:
        raise ValueError(f"The places are from {places.min()} to {places.max()}; expected 0 to {stats.total - 1}.")
    rows -= rows.max(1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    probabilities = np.exp(rows)
    part = np.zeros((len(stats.counts), len(places)))  # [S, B], 1 where the image is in the split
    part[np.searchsorted(stats.bounds, places, side="right") - 1, np.arange(len(places))] = 1
    return dataclasses.replace(
        stats,
        counts=stats.counts + part.sum(1).astype(np.int64),
        probabilities=stats.probabilities + part @ probabilities,
        negative_entropies=stats.negative_entropies + part @ (probabilities * rows).sum(1),
    )


def merge(a: ScoreStatistics, b: ScoreStatistics) -> ScoreStatistics:
    """Adds the sums over two disjoint parts of the N images.

    Raises:
      ValueError: sums of different N, splits or classes.
    """
    if (a.total, a.probabilities.shape) != (b.total, b.probabilities.shape):
        raise ValueError(
            f"The sums differ: {a.total} images {a.probabilities.shape} and {b.total} images {b.probabilities.shape}."
        )
    return ScoreStatistics(
        a.total,
        a.counts + b.counts,
        a.probabilities + b.probabilities,
        a.negative_entropies + b.negative_entropies,
    )


def compute(stats: ScoreStatistics) -> dict[str, float]:
    """Returns mean and standard deviation over the splits: "inception_score", 1 to C, and "inception_score_std".

    Raises:
      ValueError: an image is missing, or was added more than once.
    """
    if not np.array_equal(stats.counts, np.diff(stats.bounds)):
        raise ValueError(f"Images added to each split: {stats.counts}; expected {np.diff(stats.bounds)}.")
    counts = stats.counts[:, None]
    q = stats.probabilities / counts
    negative_entropy = (q * np.log(np.where(q > 0, q, 1))).sum(1)
    scores = np.exp(stats.negative_entropies / stats.counts - negative_entropy)
    return {"inception_score": float(scores.mean()), "inception_score_std": float(scores.std())}
