"""Crops and resizes of the two training stages, each a function of (image, size, generator).

Listings 1 and 2 in the appendix of Zero-Shot Text-to-Image Generation:
  dvae   random square crop of the short side s, area resize to t ~ U[9/8, 12/8]·S, random S crop, horizontal flip
  prior  near-centred square crop (offset within 3/8 to 5/8 of the slack), area resize to t ~ U[1, 9/8]·S, random S
         crop; no flip, because captions mention left, right and text
  clip   random square crop of the image resized to short side S (CLIP, arXiv 2103.00020, section 2.3); no flip
  none   centred square crop, resized to S, for evaluation and for small data sets drawn to size

With `data.fit=pad`, `fit_square` first pads each image to a square with white, so that no crop loses a part of it.

As in the paper's listings t never exceeds the short side, so no image is enlarged only to be cropped. The listings
reject an image smaller than S; here it is enlarged to S. The resize is a true area average: every source pixel counts
by the area it covers. Pillow's BOX filter differs from that at fractional ratios.

The listings resize with `align_corners=True`, and so do "dvae" and "prior" here; see `area_resize`. "clip" and "none"
resize without it. CLIP's paper does not name its resize; its released preprocessing is bicubic, and crops the centre.

    S requested size    s short side of the image    t side after the resize
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np

FITS = ("crop", "pad")
KINDS = ("none", "dvae", "prior", "clip")
_SMALL = 256  # pixels on the longer side


def fit_square(image: np.ndarray, fit: str) -> np.ndarray:
    """Pads an image to a square with white if `fit` is "pad"; "crop" leaves it to the crops of `augment`.

    Args:
      image: uint8 [H, W, 3].
      fit: one of `FITS`.

    Returns:
      uint8 [H, W, 3], or [max(H, W), max(H, W), 3] with "pad". The image is in the centre.
    """
    height, width = image.shape[:2]
    if fit == "crop" or height == width:
        return image
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side, 3), 255, np.uint8)
    square[top : top + height, left : left + width] = image
    return square


def augment(image: np.ndarray, size: int, kind: str, generator: np.random.Generator | None) -> np.ndarray:
    """Crops and resizes an image to a square of the requested size.

    Args:
      image: uint8 [H, W, 3].
      size: S, in pixels.
      kind: one of `KINDS`.
      generator: the source of randomness; not used by "none".

    Returns:
      uint8 [S, S, 3].

    Raises:
      ValueError: if the kind is unknown.
    """
    if kind == "none":
        return area_resize(centre_square(image), size)
    if kind == "dvae":
        return _dvae(image, size, generator)
    if kind == "prior":
        return _prior(image, size, generator)
    if kind == "clip":
        return area_resize(_random_square(image, generator), size)
    raise ValueError(f"Unknown augmentation {kind!r}; expected one of {', '.join(KINDS)}.")


def _dvae(image: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    image = _random_square(image, generator)
    side = _draw_side(generator, len(image), size, round(size * 9 / 8), round(size * 12 / 8))
    image = _random_crop(area_resize(image, side, align_corners=True), size, generator)
    return image[:, ::-1] if generator.random() < 0.5 else image


def _prior(image: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    short = min(image.shape[:2])
    slack = [side - short for side in image.shape[:2]]
    top, left = (int(generator.integers(3 * s // 8, max(3 * s // 8 + 1, 5 * s // 8))) for s in slack)
    side = _draw_side(generator, short, size, size, round(size * 9 / 8))
    return _random_crop(area_resize(_square(image, top, left), side, align_corners=True), size, generator)


def _random_square(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Crops a square of the short side anywhere along the long side."""
    short = min(image.shape[:2])
    top, left = (int(generator.integers(0, side - short + 1)) for side in image.shape[:2])
    return _square(image, top, left)


def _draw_side(generator: np.random.Generator, short: int, size: int, low: int, high: int) -> int:
    """Draws t from [low, high], both included, at most the short side of the image and at least S."""
    low, high = (max(size, min(short, bound)) for bound in (low, high))
    return int(generator.integers(low, high + 1))


def _random_crop(image: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    top, left = (int(generator.integers(0, side - size + 1)) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


def _centre(image: np.ndarray) -> tuple[int, int]:
    short = min(image.shape[:2])
    return (image.shape[0] - short) // 2, (image.shape[1] - short) // 2


def centre_square(image: np.ndarray) -> np.ndarray:
    """Returns the largest centred square: uint8 [H, W, 3] to uint8 [s, s, 3]."""
    return _square(image, *_centre(image))


def _square(image: np.ndarray, top: int, left: int) -> np.ndarray:
    short = min(image.shape[:2])
    return image[top : top + short, left : left + short]


def area_resize(image: np.ndarray, side: int, *, align_corners: bool = False) -> np.ndarray:
    """Resizes by area averaging: each new pixel is the mean over the area of the old image that it covers.

    With `align_corners`, a new pixel covers (n − 1) / (side − 1) old pixels and not n / side, as in the resize of
    DALL-E's listings (TensorFlow 1, `ResizeMethod.AREA`). The last new pixel then begins where the last old one does.
    Beyond the edge the last old pixel repeats. The lower right of the image shifts by up to one new pixel.

    Means of images of up to 256 pixels come from float64 sums, as in every version, so that trainings resume with the
    same pixels. Those of larger images are exact and need less than half of the time. Both agree, except for means in
    the middle of two levels, which sums in float64 may round to the odd level.

    Args:
      image: uint8 [H, W, C].
      side: height and width of the result, in pixels.
      align_corners: whether the first and the last pixel of both images begin at the same place.

    Returns:
      uint8 [side, side, C].
    """
    if image.shape[:2] == (side, side):
        return image
    if max(image.shape[:2]) <= _SMALL:
        averaged = _average_rows(image, side, align_corners)
        return np.rint(_average_rows(averaged.swapaxes(0, 1), side, align_corners).swapaxes(0, 1)).astype(np.uint8)
    return _exact_means(image, side, align_corners)


def _average_rows(image: np.ndarray, count: int, align_corners: bool) -> np.ndarray:
    """Averages over `count` equal intervals of the first axis, from differences of its running sum: float64."""
    length = image.shape[0]
    old, new = (length - 1, count - 1) if align_corners and min(length, count) > 1 else (length, count)
    edges = np.arange(count + 1) * (old / new)
    whole = np.minimum(edges.astype(np.int64), length - 1)
    part = (edges - whole).reshape(-1, *[1] * (image.ndim - 1))  # above 1 beyond the edge: the last pixel repeats
    at_edges = _running_sums(image, whole) + part * image[whole]
    return np.diff(at_edges, axis=0) * (new / old)


def _running_sums(image: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Returns the sums of all rows before each of `rows`, which rise: float64."""
    if image.dtype != np.uint8:
        return np.concatenate([np.zeros_like(image[:1]), np.cumsum(image, axis=0)])[rows]
    # Sums of integers are exact in any order. Adding up slices needs a twentieth of the time of a running sum.
    sums = np.zeros((len(rows), *image.shape[1:]), np.uint64)
    for place, (start, end) in enumerate(itertools.pairwise(rows), 1):
        sums[place] = sums[place - 1] + image[start:end].sum(axis=0, dtype=np.uint32)
    return sums.astype(np.float64)


def _exact_means(image: np.ndarray, side: int, align_corners: bool) -> np.ndarray:
    """Returns the means of `area_resize`, uint8 [side, side, C], from sums of integers."""
    height, width, channels = image.shape
    down, across = _overlaps(height, side, align_corners), _overlaps(width, side, align_corners)
    area = down.total * across.total
    # Sums of integers are exact: in int32 for images of up to about 2,900 pixels on a side, else in float64.
    dtype = np.int32 if 255 * area <= np.iinfo(np.int32).max else np.float64
    sums = _weighted_rows(image.reshape(height, -1), down, dtype)
    sums = sums.reshape(side, width, channels).swapaxes(0, 1).reshape(width, -1)
    means = _weighted_rows(sums, across, dtype) / area
    means = np.rint(means, out=means).astype(np.uint8)
    return np.ascontiguousarray(means.reshape(side, side, channels).swapaxes(0, 1))


@dataclasses.dataclass(frozen=True)
class _Overlaps:
    """How much of each old row lies in each of `count` equal intervals, in whole units.

    Attributes:
      rows: the old rows that meet an interval, int64 [count, most].
      units: their share of it, int64 [count, most]; 0 for a row that does not meet it.
      total: sum of the units of each interval.
    """

    rows: np.ndarray
    units: np.ndarray
    total: int


@functools.lru_cache(maxsize=64)
def _overlaps(length: int, count: int, align_corners: bool) -> _Overlaps:
    """Returns the overlaps of `length` rows with `count` intervals; see `area_resize`."""
    old, new = (length - 1, count - 1) if align_corners and min(length, count) > 1 else (length, count)
    old, new = old // math.gcd(old, new), new // math.gcd(old, new)
    # One row is `new` units long, and one interval is `old` units long.
    starts = np.arange(count)[:, None] * old
    ends = starts + old
    first = starts // new
    rows = first + np.arange(int(((ends - 1) // new - first).max()) + 1)
    units = np.minimum(ends, (rows + 1) * new) - np.maximum(starts, rows * new)
    return _Overlaps(np.minimum(rows, length - 1), np.maximum(units, 0), old)  # beyond the edge the last row repeats


def _weighted_rows(rows: np.ndarray, overlaps: _Overlaps, dtype: type) -> np.ndarray:
    """Sums the rows [length, n] that meet each interval, each times its units: [count, n]."""
    units = overlaps.units.astype(dtype)
    sums = np.zeros((len(units), rows.shape[1]), dtype)
    for place, each in enumerate(overlaps.rows.T):
        part = rows[each].astype(dtype, copy=False)
        part *= units[:, place, None]
        sums += part
    return sums
