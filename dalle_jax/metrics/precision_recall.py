"""Improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, section 2).

A set of images covers the balls around its features. The radius of a ball is the distance to the k-th nearest other
feature of the set, k = 3. Precision is the share of generated images inside the balls of the real ones. Recall is the
share of real images inside the balls of the generated ones.

The paper uses the features of VGG-16; here the metrics' names say which features were used. All features are kept
(N·D·4 bytes: 246 MB for 30,000 images with Inception). Only one block of the N x N distances exists at a time.

Distances are computed in float32, as products of matrices, with a bound of their error. A distance that this bound
leaves undecided is computed again in float64. The values are therefore those of float64, at the speed of float32.

    B batch    N, M images    D features    k neighbours    C rows or columns of a block
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dalle_jax.errors import DataError
from dalle_jax.metrics.rows import Rows, valid_rows

# Squared distances have a rounding error of this order, relative to squared norms. Points within it count as inside.
# Otherwise rounding would decide about exact duplicates, whose radius is 0.
_ROUNDING = 1e-12
_LARGEST = 1e36  # squared norm, with which no sum overflows in float32
_SPARE = 5  # candidates for the k nearest neighbours in addition to k, among which float64 decides


@dataclasses.dataclass(frozen=True, eq=False)
class Reservoir:
    """The features of a set of images.

    Attributes:
      features: name of the network ("inception", "clip", ...); part of the metrics' names.
      rows: the features of N images.
    """

    features: str
    rows: Rows
    _radii: dict[int, np.ndarray] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def values(self) -> np.ndarray:
        """The features, float32 [N, D], in the order in which they were added."""
        return self.rows.values

    def squared_radii(self, neighbors: int, chunk: int = 1024) -> np.ndarray:
        """Computes the squared distance of each image to its k-th nearest other image, float64 [N]. Computed once.

        Args:
          neighbors: k, less than N.
          chunk: C.
        """
        if neighbors not in self._radii:
            self._radii[neighbors] = _squared_radii(self.values, neighbors, chunk)
        return self._radii[neighbors]


def empty(width: int, features: str, count: int = 0) -> Reservoir:
    """Returns the features of no images.

    Args:
      width: D.
      features: name of the network.
      count: number of images that will be added, if it is known. It saves copies.
    """
    return Reservoir(features, Rows.empty(width, count))


def add(stats: Reservoir, features: Any, valid: Any = None) -> Reservoir:
    """Adds a batch. Only the new features are copied.

    Args:
      stats: the features so far.
      features: float [B, D], numpy or JAX, sharded or not.
      valid: bool [B], rows that count, or None for all.

    Raises:
      ValueError: features of another width, or that are not finite.
    """
    rows = valid_rows(features, valid)
    _check_alike(stats, stats.features, rows.shape)
    if not np.isfinite(rows).all():
        raise ValueError(f"Some of the {stats.features!r} features are not finite.")
    return Reservoir(stats.features, stats.rows.append(rows))


def merge(a: Reservoir, b: Reservoir) -> Reservoir:
    """Concatenates the features of two sets.

    Raises:
      ValueError: different features.
    """
    _check_alike(a, b.features, b.values.shape)
    return Reservoir(a.features, a.rows.append(b.values))


def compute(real: Reservoir, generated: Reservoir, neighbors: int = 3, chunk: int = 1024) -> dict[str, float]:
    """Computes precision and recall, as in float64.

    Args:
      real, generated: features of the two sets. The order of images does not matter.
      neighbors: k.
      chunk: C. A block needs about 20·C² + 40·C·D bytes; the result does not depend on it.

    Returns:
      "precision_F" and "recall_F", in [0, 1]; F is the name of the features.

    Raises:
      DataError: at most k images in a set.
      ValueError: features of different networks.
    """
    _check_alike(real, generated.features, generated.values.shape)
    if min(len(real.values), len(generated.values)) <= neighbors:
        raise DataError(
            f"Precision and recall of {len(real.values)} real and {len(generated.values)} generated images by "
            f"{neighbors} neighbours: expected at least {neighbors + 1} of each."
        )
    points = _Points(generated.values, real.values)
    slack = _ROUNDING * max(points.squares.max(), points.other_squares.max())
    real_radii = real.squared_radii(neighbors, chunk) + slack
    generated_radii = generated.squared_radii(neighbors, chunk) + slack
    inside, covered = np.zeros(len(generated.values), bool), np.zeros(len(real.values), bool)
    for rows in _slices(len(inside), chunk):
        for columns in _slices(len(covered), chunk):
            block = _Block(points, rows, columns)
            block.mark_rows(real_radii[columns], inside[rows])
            block.mark_columns(generated_radii[rows], covered[columns])
    return {
        f"precision_{real.features}": float(inside.mean()),
        f"recall_{real.features}": float(covered.mean()),
    }


class _Points:
    """Two sets of points, [M, D] and [N, D], about a common centre.

    Distances do not change, and rounding errors become smaller.

    Attributes:
      squares, other_squares: squared norms about the centre, float64 [M] and [N].
      largest: the largest of them.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray):
        self._a, self._b = a, b
        self._center = b.mean(0, dtype=np.float64).astype(np.float32)
        self.squares = self._squares(a)
        self.other_squares = self.squares if a is b else self._squares(b)
        self.largest = max(self.squares.max(), self.other_squares.max())

    def errors(self, squares: np.ndarray) -> np.ndarray:
        """Bounds the errors of squared distances in float32 from points to any others.

        A sum of D products in any order has an error of at most D·u/(1 − D·u) times |x||y|, where u is half the
        distance of 1 to the next number (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). And
        2|x||y| is at most |x|² + |y|². Centres, sums and comparisons with a radius, which is at most 4·max |x|², add a
        few u of the largest |x|². Products below the normal numbers may be lost.

        Args:
          squares: squared norms of the points.
        """
        number, size = np.finfo(np.float32), self._a.shape[1]
        steps = (size + 64) * number.eps / 2
        return steps / (1 - steps) * (squares + self.largest) + 2 * (size + 16) * number.tiny

    def rows(self, places: slice | np.ndarray) -> np.ndarray:
        """Returns some points of the first set, float32 [C, D]."""
        return self._a[places] - self._center

    def columns(self, places: slice | np.ndarray) -> np.ndarray:
        """Returns some points of the second set, float32 [C, D]."""
        return self._b[places] - self._center

    def exact(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Computes the squared distances of pairs of points, int [P] and int [P] to float64 [P]."""
        distances = np.empty(len(i))
        for pairs in _slices(len(i), 1024):
            difference = self._a[i[pairs]].astype(np.float64) - self._b[j[pairs]]
            distances[pairs] = np.einsum("pd,pd->p", difference, difference)
        return distances

    def exact_block(self, rows: slice | np.ndarray, columns: slice | np.ndarray) -> np.ndarray:
        """Computes the squared distances of all pairs of some points, float64 [C, C]."""
        a, b = (x.astype(np.float64) - self._center for x in (self._a[rows], self._b[columns]))
        squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)
        return np.maximum(squares - 2 * (a @ b.T), 0)

    def _squares(self, x: np.ndarray) -> np.ndarray:
        parts = [np.square((x[rows] - self._center).astype(np.float64)).sum(1) for rows in _slices(len(x), 1024)]
        return np.concatenate(parts)


class _Block:
    """Squared distances of some points to some others: the product −2xy in float32, to which |x|² + |y|² is added.

    If squared norms do not fit into float32, all products are NaN, which decides nothing.

    Attributes:
      products: float32 [C, C].
    """

    def __init__(self, points: _Points, rows: slice, columns: slice):
        self._points, self._rows, self._columns = points, rows, columns
        if points.largest > _LARGEST:
            self.products = np.full((rows.stop - rows.start, columns.stop - columns.start), np.nan, np.float32)
        else:
            self.products = (-2 * points.rows(rows)) @ points.columns(columns).T

    def mark_rows(self, limits: np.ndarray, found: np.ndarray) -> None:
        """Marks the points of the rows that lie within the limit of any column.

        Args:
          limits: squared distances, float64 [C], one for each column.
          found: bool [C], true for points that were marked before. Changed in place.
        """
        squares, others = self._points.squares[self._rows], self._points.other_squares[self._columns]
        _mark(self.products, squares, limits - others, self._points.errors(squares), limits, found, self._exact)

    def mark_columns(self, limits: np.ndarray, found: np.ndarray) -> None:
        """Does the same for the points of the columns, within the limit of any row."""
        squares, others = self._points.other_squares[self._columns], self._points.squares[self._rows]
        exact = lambda j, i: self._exact(i, j)
        _mark(self.products.T, squares, limits - others, self._points.errors(squares), limits, found, exact)

    def _exact(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Computes the squared distances of pairs of the block in float64: int [P] and int [P] to [P]."""
        if len(i) > len(self.products):  # a product of matrices is faster than many pairs
            return self._points.exact_block(self._rows, self._columns)[i, j]
        return self._points.exact(i + self._rows.start, j + self._columns.start)


def _mark(
    products: np.ndarray,
    squares: np.ndarray,
    room: np.ndarray,
    errors: np.ndarray,
    limits: np.ndarray,
    found: np.ndarray,
    exact: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> None:
    """Marks the rows of a block that lie within the limit of any column; see `_Block`.

    A row lies within the limit of a column if its product with it, plus |x|², is at most the limit minus |y|².

    Args:
      products: −2xy, float32 [C, C].
      squares: |x|², float64 [C].
      room: limit − |y|² of each column, float64 [C].
      errors: bounds of the errors of the rows, float64 [C].
      limits: of the columns, float64 [C].
      found: bool [C]. Changed in place.
      exact: computes squared distances of pairs of a row and a column in float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        excess = products - room.astype(np.float32)
        nearest = excess.min(1) + squares
        found |= nearest + errors <= 0
        open_rows = np.nonzero(~found & ~(nearest - errors > 0))[0]
        if len(open_rows):
            low = excess[open_rows] + (squares - errors)[open_rows, None]
            i, j = np.nonzero(~(low > 0))
            i = open_rows[i]
            found[i[exact(i, j) <= limits[j]]] = True


def _squared_radii(values: np.ndarray, neighbors: int, chunk: int) -> np.ndarray:
    """Computes the squared distance of each point to its k-th nearest other point: [N, D] to float64 [N]."""
    points, count = _Points(values, values), min(neighbors + _SPARE, len(values) - 1)
    near = np.full((len(values), count), np.inf, np.float32)  # squared distances, without |x|² of the point
    who = np.zeros((len(values), count), np.int64)

    def keep(rows: slice, columns: slice, distances: np.ndarray) -> None:
        """Updates the nearest candidates of some points."""
        better = np.nonzero(~(distances.min(1) >= near[rows].max(1)))[0]
        chosen = better + rows.start
        both = np.concatenate([near[chosen], distances[better]], axis=1)
        best = np.argpartition(both, count - 1, axis=1)[:, :count]
        known = np.take_along_axis(who[chosen], np.minimum(best, count - 1), axis=1)
        near[chosen] = np.take_along_axis(both, best, axis=1)
        who[chosen] = np.where(best < count, known, best - count + columns.start)

    with np.errstate(over="ignore", invalid="ignore"):
        norms = points.squares.astype(np.float32)
        for rows in _slices(len(values), chunk):
            for columns in _slices(len(values), chunk, rows.start):
                products = _Block(points, rows, columns).products
                if rows == columns:
                    np.fill_diagonal(products, np.inf)  # the nearest point would be the point itself
                else:
                    keep(columns, rows, products.T + norms[rows])
                keep(rows, columns, products + norms[columns])
        # All other points are at least this far away. If that does not decide, float64 measures all distances.
        nearest_other = near.max(1) + points.squares - points.errors(points.squares)
    radii = np.empty(len(values))
    for rows in _slices(len(values), chunk):
        i = np.repeat(np.arange(rows.start, rows.stop), count)
        exact = points.exact(i, who[rows].ravel()).reshape(-1, count)
        radii[rows] = np.partition(exact, neighbors - 1, axis=1)[:, neighbors - 1]
    decided = np.isfinite(nearest_other) & (radii <= nearest_other)
    undecided = np.nonzero(~decided)[0]
    for rows in _slices(len(undecided), chunk):
        radii[undecided[rows]] = _radii_in_float64(points, undecided[rows], neighbors, chunk)
    return radii


def _radii_in_float64(points: _Points, chosen: np.ndarray, neighbors: int, chunk: int) -> np.ndarray:
    """Computes the radii of some points, int [C], from all of their distances."""
    near = np.empty((len(chosen), 0))
    for columns in _slices(len(points.squares), chunk):
        # The nearest one is the point itself.
        near = np.concatenate([near, points.exact_block(chosen, columns)], axis=1)
        near = np.partition(near, min(neighbors, near.shape[1] - 1), axis=1)[:, : neighbors + 1]
    return near.max(1)


def _slices(count: int, size: int, start: int = 0) -> Iterator[slice]:
    """Splits `start` to `count` - 1 into slices of `size`."""
    return (slice(begin, min(begin + size, count)) for begin in range(start, count, size))


def _check_alike(a: Reservoir, features: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 2 or (a.features, a.values.shape[1]) != (features, shape[1]):
        raise ValueError(f"The features differ: {a.features!r} {a.values.shape} and {features!r} {shape}.")
