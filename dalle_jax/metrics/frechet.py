"""The Fréchet distance between the features of two sets of images: FID (Heusel et al., arXiv 1706.08500).

Each set is described by the mean m and the covariance S of its features, as if they were Gaussian. The distance is

    |m1 − m2|² + tr S1 + tr S2 − 2 tr (S1 S2)^½

Statistics are float64 on the host: a count, the mean, and the sum of outer products *about that mean*. Two parts are
merged as in Chan et al., so that features far from zero lose no precision.

The square root uses factors S = L Lᵀ from an eigendecomposition: tr (S1 S2)^½ is the sum of the singular values of
L1ᵀ L2. These are the roots of the eigenvalues of √S1 S2 √S1, but computed without squaring first. They are never
complex, and exact up to rounding even with fewer images than features.

    B batch    D features    R rank of a covariance
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.rows import valid_rows

INCEPTION = "inception"  # the pool features of `models/inception.py`
INCEPTION_WIDTH = 2048
BLOCK = 1024  # rows that are multiplied at once


@dataclasses.dataclass(frozen=True, eq=False)
class _Moments:
    """Count, mean [D] and scatter [D, D] of features."""

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    def plus(self, other: _Moments) -> _Moments:
        count = self.count + other.count
        if not self.count or not other.count:
            return self if self.count else other
        delta = other.mean - self.mean
        scatter = np.outer(delta, delta * (self.count * other.count / count))
        scatter += self.scatter
        scatter += other.scatter
        return _Moments(count, self.mean + delta * (other.count / count), scatter)


class FeatureStatistics:
    """Count, mean and scatter of the features of a set of images.

    Rows wait until there are `BLOCK` of them, because each product adds one matrix [D, D].

    Attributes:
      features: name of the network: "inception", or another.
    """

    def __init__(self, features: str, count: int, mean: np.ndarray, scatter: np.ndarray):
        """
        Args:
          features: name of the network.
          count: number of images.
          mean: float64 [D].
          scatter: float64 [D, D], sum of (x − mean)(x − mean)ᵀ.
        """
        self.features = features
        self._moments = _Moments(count, mean, scatter)
        self._waiting: tuple[np.ndarray, ...] = ()  # of [B, D]

    @property
    def width(self) -> int:
        """D."""
        return self._moments.mean.size

    @property
    def count(self) -> int:
        """Number of images."""
        return self._moments.count + sum(map(len, self._waiting))

    @property
    def mean(self) -> np.ndarray:
        """Mean of the features, float64 [D]."""
        return self._complete().mean

    @property
    def scatter(self) -> np.ndarray:
        """Sum of (x − mean)(x − mean)ᵀ, float64 [D, D]."""
        return self._complete().scatter

    @property
    def metric(self) -> str:
        """Name of the distance: "fid" for Inception's features, "fid_<network>" for others."""
        return "fid" if self.features == INCEPTION else f"fid_{self.features}"

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased covariance (divided by count − 1, as in other implementations), float64 [D, D]."""
        return self.scatter / (self.count - 1)

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """L with L Lᵀ = covariance, float64 [D, R], without directions whose variance is only rounding error."""
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > values[-1] * len(values) * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])

    def _complete(self) -> _Moments:
        """Returns the moments of all rows. Afterwards none of them waits."""
        if self._waiting:
            rows = np.concatenate(self._waiting).astype(np.float64)
            mean = rows.mean(0)
            rows -= mean
            self._moments = self._moments.plus(_Moments(len(rows), mean, rows.T @ rows))
            self._waiting = ()
        return self._moments

    def _with(self, rows: np.ndarray) -> FeatureStatistics:
        """Returns the statistics of these images and of more, [B, D]."""
        found = FeatureStatistics(self.features, self._moments.count, self._moments.mean, self._moments.scatter)
        found._waiting = (*self._waiting, rows)
        if sum(map(len, found._waiting)) >= BLOCK:
            found._complete()
        return found


def empty(width: int, features: str = INCEPTION) -> FeatureStatistics:
    """Returns the statistics of no images.

    Args:
      width: D.
      features: name of the network; part of the metric's name.

    Raises:
      ValueError: "inception" with another width than that of its pool features.
    """
    if features == INCEPTION and width != INCEPTION_WIDTH:
        raise ValueError(f"{features!r} features have width {INCEPTION_WIDTH}, not {width}: use another name.")
    return FeatureStatistics(features, 0, np.zeros(width), np.zeros((width, width)))


def stored(mean: np.ndarray, covariance: np.ndarray, features: str = INCEPTION) -> FeatureStatistics:
    """Returns statistics that were computed elsewhere.

    Their number of images is unknown. Two of them with this scatter have the same covariance.

    Args:
      mean: float64 [D].
      covariance: the unbiased covariance, float64 [D, D].
      features: name of the network.
    """
    return FeatureStatistics(features, 2, mean, covariance)


def add(stats: FeatureStatistics, features: Any, valid: Any = None) -> FeatureStatistics:
    """Adds a batch.

    Args:
      stats: the statistics so far.
      features: float [B, D], numpy or JAX, sharded or not.
      valid: bool [B], rows that count, or None for all.

    Raises:
      ValueError: features of another width, or that are not finite.
    """
    rows = valid_rows(features, valid)
    if rows.ndim != 2 or rows.shape[1] != stats.width:
        raise ValueError(f"Features are {rows.shape}; expected [B, {stats.width}].")
    if not np.isfinite(rows).all():
        raise ValueError(f"Some of the {stats.features!r} features are not finite.")
    for start in range(0, len(rows), BLOCK):
        # A copy, because the rows wait and the caller may reuse its array.
        stats = stats._with(np.array(rows[start : start + BLOCK]))
    return stats


def merge(a: FeatureStatistics, b: FeatureStatistics) -> FeatureStatistics:
    """Merges the statistics of two sets of images.

    Raises:
      ValueError: statistics of different features.
    """
    _check_alike(a, b)
    if not a.count or not b.count:
        return a if a.count else b
    both = a._complete().plus(b._complete())
    return FeatureStatistics(a.features, both.count, both.mean, both.scatter)


def compute(a: FeatureStatistics, b: FeatureStatistics) -> dict[str, float]:
    """Returns the distance by name: "fid" for Inception's pool features, "fid_clip" for CLIP's, and so on.

    Raises:
      DataError, ValueError: as `distance`.
    """
    return {a.metric: distance(a, b)}


def distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Computes the Fréchet distance, 0 or more; symmetric.

    Raises:
      DataError: fewer than two images in a set.
      ValueError: statistics of different features.
    """
    _check_alike(a, b)
    if min(a.count, b.count) < 2:
        raise DataError(f"A Fréchet distance needs at least two images in each set; given {a.count} and {b.count}.")
    shared = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    spread = np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(0.0, float(np.square(a.mean - b.mean).sum() + spread))


def _check_alike(a: FeatureStatistics, b: FeatureStatistics) -> None:
    if (a.features, a.width) != (b.features, b.width):
        raise ValueError(
            f"The statistics are of different features: {a.width} {a.features!r} and {b.width} {b.features!r}."
        )
