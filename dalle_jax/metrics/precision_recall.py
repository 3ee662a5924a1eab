"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, section 2).

A set of images covers the balls around its features. The radius of a ball is the distance to the k-th nearest other
feature of the set, k = 3. Precision is the share of generated images inside the balls of the real ones. Recall is the
share of real images inside the balls of the generated ones.

The paper uses the features of VGG-16; here the metrics' names say which features were used. All features are kept
(N·D·4 bytes: 246 MB for 30,000 images with Inception). Only a few rows of the N x N distances exist at a time.

    B batch    N images    D features    k neighbours
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.rows import valid_rows

# Squared distances have a rounding error of this order, relative to squared norms. Points within it count as inside.
# Otherwise rounding would decide about exact duplicates, whose radius is 0.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True, eq=False)
class Reservoir:
    """The features of a set of images.

    Attributes:
      features: name of the network ("inception", "clip", ...); part of the metrics' names.
      values: float32 [N, D].
    """

    features: str
    values: np.ndarray


def empty(width: int, features: str) -> Reservoir:
    """Returns the features of no images, D = width."""
    return Reservoir(features, np.zeros((0, width), np.float32))


def add(stats: Reservoir, features: Any, valid: Any = None) -> Reservoir:
    """Adds a batch.

    Args:
      stats: the features so far. They are copied, so that large batches are better.
      features: float [B, D], numpy or JAX, sharded or not.
      valid: bool [B], rows that count, or None for all.

    Raises:
      ValueError: features of another width, or that are not finite.
    """
    rows = valid_rows(features, valid).astype(np.float32)
    if not np.isfinite(rows).all():
        raise ValueError(f"Some of the {stats.features!r} features are not finite.")
    return merge(stats, Reservoir(stats.features, rows))


def merge(a: Reservoir, b: Reservoir) -> Reservoir:
    """Concatenates the features of two sets.

    Raises:
      ValueError: different features.
    """
    _check_alike(a, b)
    return Reservoir(a.features, np.concatenate([a.values, b.values]))


def compute(real: Reservoir, generated: Reservoir, neighbors: int = 3, chunk: int = 1024) -> dict[str, float]:
    """Computes precision and recall, in float64.

    Args:
      real, generated: features of the two sets. The order of images does not matter.
      neighbors: k.
      chunk: rows of distances at a time. They need 8·chunk·N bytes; the result does not depend on it.

    Returns:
      "precision_F" and "recall_F", in [0, 1]; F is the name of the features.

    Raises:
      DataError: at most k images in a set.
      ValueError: features of different networks.
    """
    _check_alike(real, generated)
    if min(len(real.values), len(generated.values)) <= neighbors:
        raise DataError(
            f"Precision and recall of {len(real.values)} real and {len(generated.values)} generated images by "
            f"{neighbors} neighbours: expected at least {neighbors + 1} of each."
        )
    # Subtract a common centre: distances do not change, and rounding errors become smaller.
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
    """Computes squared distances: [M, D] and [N, D] to [M, N]."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
    return np.maximum(squares - 2 * (a @ b.T), 0)


def _squared_radii(points: np.ndarray, neighbors: int, chunk: int) -> np.ndarray:
    """Computes the squared distance of each point to its k-th nearest other point: [N, D] to [N]."""
    # The nearest one is the point itself.
    parts = [
        np.partition(_squared_distances(points[start : start + chunk], points), neighbors, axis=1)[:, neighbors]
        for start in range(0, len(points), chunk)
    ]
    return np.concatenate(parts)


def _check_alike(a: Reservoir, b: Reservoir) -> None:
    if a.values.ndim != 2 or b.values.ndim != 2 or (a.features, a.values.shape[1]) != (b.features, b.values.shape[1]):
        raise ValueError(f"The features differ: {a.features!r} {a.values.shape} and {b.features!r} {b.values.shape}.")
