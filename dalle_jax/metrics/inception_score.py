"""The Inception score (Salimans et al., arXiv 1606.03498): exp of the mean KL(p(y|x) ‖ p(y)), over ten splits.

The score is computed on each of S consecutive parts of the N pictures and reported as mean and standard deviation over
the parts; split i holds the pictures from i·N//S up to (i+1)·N//S − 1. It depends on the order, which is therefore the
caller's to say: every picture comes with its place in the whole. With the same order it is torch-fidelity's score
(`samples_shuffle=False`; by default that package shuffles first).

Of each split only three sums are kept, Σ p, Σ p·ln p and the count, because

    mean KL = (Σ Σ_y p ln p) / n − Σ_y q ln q,    q = Σ p / n

so N pictures take as much memory as one, parts merge by adding, and neither the order of batches nor the number of
hosts matters. The network's logits go in without the bias of its last layer, as the original code takes them.

    B batch    C classes    S splits    N pictures in all
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.hosts import local_rows


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreStatistics:
    """Sums over the pictures of each split.

    Attributes:
      total: N, how many pictures there will be.
      counts: int64 [S], how many were added.
      probabilities: float64 [S, C], sum of p(y|x).
      negative_entropies: float64 [S], sum of Σ_y p ln p, nats.
    """

    total: int
    counts: np.ndarray
    probabilities: np.ndarray
    negative_entropies: np.ndarray

    @property
    def bounds(self) -> np.ndarray:
        """Place of the first picture of each split, and N: int64 [S + 1]."""
        splits = len(self.counts)
        return np.arange(splits + 1) * self.total // splits


def empty(total: int, splits: int = 10, classes: int = 1008) -> ScoreStatistics:
    """Sums over no pictures.

    Args:
      total: N, over all hosts.
      splits: S.
      classes: C.

    Raises:
      DataError: fewer pictures than splits.
    """
    if not 1 <= splits <= total:
        raise DataError(f"An Inception score over {splits} splits of {total} pictures: expected at least one in each.")
    return ScoreStatistics(total, np.zeros(splits, np.int64), np.zeros((splits, classes)), np.zeros(splits))


def add(stats: ScoreStatistics, logits: Any, places: Any, valid: Any = None) -> ScoreStatistics:
    """Adds a batch.

    Args:
      stats: so far.
      logits: float [B, C], without the last layer's bias; numpy or JAX, sharded or not.
      places: int [B], each picture's place in the whole, 0 to N − 1; laid out as `logits`.
      valid: bool [B], rows that count. None: all.

    Raises:
      ValueError: logits of another width or not finite, or places outside of the whole.
    """
    rows, places = local_rows(logits, valid).astype(np.float64), local_rows(places, valid)
    if rows.shape != (len(places), stats.probabilities.shape[1]):
        raise ValueError(f"Logits are {rows.shape}; expected [{len(places)}, {stats.probabilities.shape[1]}].")
    if not np.isfinite(rows).all():
        raise ValueError("Some of the logits are not finite.")
    if len(places) and not 0 <= places.min() <= places.max() < stats.total:
        raise ValueError(f"Places from {places.min()} to {places.max()}; expected 0 to {stats.total - 1}.")
    rows -= rows.max(1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    probabilities = np.exp(rows)
    part = np.zeros((len(stats.counts), len(places)))  # [S, B], which picture is in which split
    part[np.searchsorted(stats.bounds, places, side="right") - 1, np.arange(len(places))] = 1
    return dataclasses.replace(
        stats,
        counts=stats.counts + part.sum(1).astype(np.int64),
        probabilities=stats.probabilities + part @ probabilities,
        negative_entropies=stats.negative_entropies + part @ (probabilities * rows).sum(1),
    )


def merge(a: ScoreStatistics, b: ScoreStatistics) -> ScoreStatistics:
    """Sums over both sets of pictures, which have to be parts of one whole.

    Raises:
      ValueError: of wholes of different sizes, splits or classes.
    """
    if (a.total, a.probabilities.shape) != (b.total, b.probabilities.shape):
        raise ValueError(
            f"Sums over {a.total} pictures, [splits, classes] {a.probabilities.shape}, and over {b.total}, "
            f"{b.probabilities.shape}, do not add up."
        )
    return ScoreStatistics(
        a.total,
        a.counts + b.counts,
        a.probabilities + b.probabilities,
        a.negative_entropies + b.negative_entropies,
    )


def compute(stats: ScoreStatistics) -> dict[str, float]:
    """Mean and deviation over the splits: "inception_score", 1 to C, and "inception_score_std".

    Raises:
      ValueError: not all pictures were added, or some more than once.
    """
    if not np.array_equal(stats.counts, np.diff(stats.bounds)):
        raise ValueError(f"Pictures added to each split: {stats.counts}; expected {np.diff(stats.bounds)}.")
    counts = stats.counts[:, None]
    q = stats.probabilities / counts
    negative_entropy = (q * np.log(np.where(q > 0, q, 1))).sum(1)
    scores = np.exp(stats.negative_entropies / stats.counts - negative_entropy)
    return {"inception_score": float(scores.mean()), "inception_score_std": float(scores.std())}
