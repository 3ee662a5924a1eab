"""The Fréchet distance between two sets of pictures, seen through features: FID (Heusel et al., arXiv 1706.08500).

Each set is described by the mean m and the covariance S of its features as if they were Gaussian; the distance is

    |m1 − m2|² + tr S1 + tr S2 − 2 tr (S1 S2)^½

Statistics are float64 on the host: a count, the mean, and the sum of outer products *about that mean* (two parts are
joined as Chan et al. do), so that features far from zero lose nothing.

The square root: with factors S = L Lᵀ from an eigendecomposition, tr (S1 S2)^½ is the sum of the singular values of
L1ᵀ L2. They are the roots of the eigenvalues of √S1 S2 √S1, but taken without squaring first: never complex, and exact
to rounding where there are fewer pictures than features.

    B batch    D features    R rank of a covariance
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.hosts import local_rows

INCEPTION = "inception"  # the pool features of `models/inception.py`
INCEPTION_WIDTH = 2048


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """What is kept of the features of a set of pictures.

    Attributes:
      features: what they are: "inception", or another network's name.
      count: how many pictures.
      mean: float64 [D].
      scatter: float64 [D, D], sum of (x − mean)(x − mean)ᵀ.
    """

    features: str
    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def metric(self) -> str:
        """Name of a distance between such features: "fid" is Inception's alone, others say whose they are."""
        return "fid" if self.features == INCEPTION else f"fid_{self.features}"

    @property
    def covariance(self) -> np.ndarray:
        """float64 [D, D], unbiased (divided by count − 1), as other implementations have it."""
        return self.scatter / (self.count - 1)


def empty(width: int, features: str = INCEPTION) -> FeatureStatistics:
    """Statistics of no pictures.

    Args:
      width: D.
      features: what the features are; it makes the metric's name.

    Raises:
      ValueError: "inception" of another width than its pool features have.
    """
    if features == INCEPTION and width != INCEPTION_WIDTH:
        raise ValueError(f"{features!r} features are {INCEPTION_WIDTH} wide, given {width}: give yours another name.")
    return FeatureStatistics(features, 0, np.zeros(width), np.zeros((width, width)))


def add(stats: FeatureStatistics, features: Any, valid: Any = None) -> FeatureStatistics:
    """Adds a batch.

    Args:
      stats: so far.
      features: float [B, D], numpy or JAX, sharded or not. Its cost is that of one D x D matrix besides the products:
        hundreds of rows at once are better than a few.
      valid: bool [B], rows that count. None: all.

    Raises:
      ValueError: features of another width, or that are not finite.
    """
    rows = local_rows(features, valid).astype(np.float64)
    if rows.ndim != 2 or rows.shape[1] != stats.mean.size:
        raise ValueError(f"Features are {rows.shape}; expected [B, {stats.mean.size}].")
    if not np.isfinite(rows).all():
        raise ValueError(f"Some of the {stats.features!r} features are not finite.")
    if not len(rows):
        return stats
    mean = rows.mean(0)
    rows -= mean
    return merge(stats, FeatureStatistics(stats.features, len(rows), mean, rows.T @ rows))


def merge(a: FeatureStatistics, b: FeatureStatistics) -> FeatureStatistics:
    """Statistics of both sets together.

    Raises:
      ValueError: of different features.
    """
    _check_alike(a, b)
    count = a.count + b.count
    if not a.count or not b.count:
        return a if a.count else b
    delta = b.mean - a.mean
    scatter = np.outer(delta, delta * (a.count * b.count / count))
    scatter += a.scatter
    scatter += b.scatter
    return FeatureStatistics(a.features, count, a.mean + delta * (b.count / count), scatter)


def compute(a: FeatureStatistics, b: FeatureStatistics) -> dict[str, float]:
    """The distance under its name: "fid" of Inception's pool features, "fid_clip" of features "clip", and so on.

    Raises:
      DataError, ValueError: as `distance`.
    """
    return {a.metric: distance(a, b)}


def distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """The Fréchet distance, 0 or more; symmetric.

    Raises:
      DataError: fewer than two pictures on a side.
      ValueError: statistics of different features.
    """
    _check_alike(a, b)
    if min(a.count, b.count) < 2:
        raise DataError(f"A Fréchet distance between {a.count} and {b.count} pictures: expected at least two each.")
    shared = np.linalg.svd(_factor(a.covariance).T @ _factor(b.covariance), compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(0.0, float(np.square(a.mean - b.mean).sum() + spread))


def _factor(covariance: np.ndarray) -> np.ndarray:
    """L with L Lᵀ = covariance, [D, R]; without the directions whose variance is nothing but rounding."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
    return vectors[:, kept] * np.sqrt(values[kept])


def _check_alike(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if (a.features, a.mean.size) != (b.features, b.mean.size):
        raise ValueError(
            f"Statistics of {a.mean.size} {a.features!r} and of {b.mean.size} {b.features!r} features do not compare."
        )
