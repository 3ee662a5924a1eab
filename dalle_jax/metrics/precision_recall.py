"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, section 2).

Each set of pictures is taken to cover the balls around its features whose radius is the distance to the k-th nearest
other feature of the set, k = 3. Precision: the share of generated pictures inside the real ones' balls. Recall: the
share of real pictures inside the generated ones'.

The paper's features are VGG-16's; the names of the figures say which were used. All features are kept (N·D·4 bytes:
30,000 Inception features are 246 MB); of the N x N distances only a few rows exist at a time.

    B batch    N pictures    D features    k neighbours
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.hosts import local_rows

# Squared distances carry a rounding error of this order, relative to squared norms; within it, "on the sphere" counts
# as inside. Without it rounding would decide on exact duplicates, whose radius is 0.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Reservoir:
    """The features of a set of pictures.

    Attributes:
      features: what they are ("inception", "clip", ...); it makes the figures' names.
      values: float32 [N, D].
    """

    features: str
    values: np.ndarray


def empty(width: int, features: str) -> Reservoir:
    """No pictures, D = width."""
    return Reservoir(features, np.zeros((0, width), np.float32))


def add(stats: Reservoir, features: Any, valid: Any = None) -> Reservoir:
    """Adds a batch.

    Args:
      stats: so far; copied, so that large batches are better.
      features: float [B, D], numpy or JAX, sharded or not.
      valid: bool [B], rows that count. None: all.

    Raises:
      ValueError: features of another width, or that are not finite.
    """
    rows = local_rows(features, valid).astype(np.float32)
    if not np.isfinite(rows).all():
        raise ValueError(f"Some of the {stats.features!r} features are not finite.")
    return merge(stats, Reservoir(stats.features, rows))


def merge(a: Reservoir, b: Reservoir) -> Reservoir:
    """Both sets together, one after the other.

    Raises:
      ValueError: of different features.
    """
    _check_alike(a, b)
    return Reservoir(a.features, np.concatenate([a.values, b.values]))


def compute(real: Reservoir, generated: Reservoir, neighbors: int = 3, chunk: int = 1024) -> dict[str, float]:
    """Precision and recall, in float64.

    Args:
      real, generated: features of the two sets; the order of pictures does not matter.
      neighbors: k.
      chunk: rows of distances at a time; it takes 8·chunk·N bytes and does not change the result.

    Returns:
      "precision_F" and "recall_F", in [0, 1], where F names the features.

    Raises:
      DataError: k pictures or fewer on a side.
      ValueError: sets of different features.
    """
    _check_alike(real, generated)
    if min(len(real.values), len(generated.values)) <= neighbors:
        raise DataError(
            f"Precision and recall of {len(real.values)} real and {len(generated.values)} generated pictures by "
            f"{neighbors} neighbours: expected at least {neighbors + 1} each."
        )
    # About a common centre: distances stay, and less of them is lost to rounding.
    center = real.values.mean(0, dtype=np.float64)
    x, y = real.values - center, generated.values - center
    slack = _ROUNDING * max(np.square(x).sum(1).max(), np.square(y).sum(1).max())
    real_radii, generated_radii = (_squared_radii(points, neighbors, chunk) + slack for points in (x, y))
    covered = np.zeros(len(x), bool)
    inside = []
    for start in range(0, len(y), chunk):
        distances = _squared_distances(y[start : start + chunk], x)
        inside.append((distances <= real_radii).any(1))
        covered |= (distances <= generated_radii[start : start + chunk, None]).any(0)
    return {
        f"precision_{real.features}": float(np.concatenate(inside).mean()),
        f"recall_{real.features}": float(covered.mean()),
    }


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[M, D] and [N, D] to [M, N]."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
    return np.maximum(squares - 2 * (a @ b.T), 0)


def _squared_radii(points: np.ndarray, neighbors: int, chunk: int) -> np.ndarray:
    """Squared distance of each point to its k-th nearest other: [N, D] to [N]."""
    # The nearest of all is the point itself.
    parts = [
        np.partition(_squared_distances(points[start : start + chunk], points), neighbors, axis=1)[:, neighbors]
        for start in range(0, len(points), chunk)
    ]
    return np.concatenate(parts)


def _check_alike(a: Reservoir, b: Reservoir) -> None:
    if a.values.ndim != 2 or b.values.ndim != 2 or (a.features, a.values.shape[1]) != (b.features, b.values.shape[1]):
        raise ValueError(
            f"Features {a.features!r} {a.values.shape} and {b.features!r} {b.values.shape} do not go together."
        )
