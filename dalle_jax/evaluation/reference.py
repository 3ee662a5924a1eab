"""The real images of an evaluation by class: published reference statistics, a folder, or a model's own data.

ADM (arXiv 2105.05233) publishes such statistics as npz files, for instance `VIRTUAL_imagenet256_labeled.npz`:

    arr_0          uint8 [10000, 256, 256, 3]        images, for precision and recall
    mu, sigma      float [2048], [2048, 2048]        mean and covariance of Inception's features over ImageNet
    mu_s, sigma_s  float [2023], [2023, 2023]        the same of spatial features, for sFID; they are not read

Files with `arr_0` alone and files with `mu` and `sigma` alone are reference statistics, too.

    P images    H, W their size    D features
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
import zlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from absl import logging

from dalle_jax.data.labels import Labels
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.record import Record
from dalle_jax.data.sources.source import DataOptions, UnreadableExample, decode_captions
from dalle_jax.errors import DataError
from dalle_jax.evaluation.test_sets import Protocol as Choice
from dalle_jax.evaluation.test_sets import TestSet, read_examples
from dalle_jax.metrics import frechet
from dalle_jax.metrics.frechet import INCEPTION_WIDTH, FeatureStatistics

IMAGES, MEAN, COVARIANCE = "arr_0", "mu", "sigma"
_SHAPES = {MEAN: (INCEPTION_WIDTH,), COVARIANCE: (INCEPTION_WIDTH, INCEPTION_WIDTH)}


class Reference(Protocol):
    """Real images to compare with.

    Attributes:
      description: says where they are from, for the report.
      count: P; 0 if there are statistics alone.
      statistics: stored statistics of Inception's features, or None if they are computed from the images.
      labels: the class of each image, int [P], or None if they are unknown.
    """

    description: str
    count: int
    statistics: FeatureStatistics | None
    labels: np.ndarray | None

    def batches(self, places: range, size: int) -> Iterator[np.ndarray]:
        """Yields the images at some places, uint8 [up to `size`, H, W, 3], in order."""


@dataclasses.dataclass(frozen=True)
class StoredReference:
    """An npz file. Attributes as in `Reference`. Create one with `read_npz`."""

    path: str
    count: int
    statistics: FeatureStatistics | None
    shape: tuple[int, ...]
    labels: None = None

    @property
    def description(self) -> str:
        """See `Reference`."""
        return os.path.basename(self.path)

    def batches(self, places: range, size: int) -> Iterator[np.ndarray]:
        """See `Reference.batches`. The file is read piece by piece, so that it need not fit into memory.

        Raises:
          DataError: the file is damaged.
        """
        if not places:
            return  # the file may have no images
        each = int(np.prod(self.shape[1:]))
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(f"{IMAGES}.npy") as file:
                _header(file)
                file.seek(places.start * each, os.SEEK_CUR)
                for start in range(places.start, places.stop, size):
                    count = min(size, places.stop - start)
                    yield np.frombuffer(file.read(count * each), np.uint8).reshape(count, *self.shape[1:])
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
            raise DataError(f"config.reference={self.path} is damaged at {IMAGES}: {error}. Get it again.") from error


@dataclasses.dataclass(frozen=True)
class ImageReference:
    """Images of a source. Attributes as in `Reference`. Create one with `read_images`."""

    images: TestSet
    labels: np.ndarray | None
    statistics: None = None

    @property
    def count(self) -> int:
        """See `Reference`."""
        return len(self.images.indices)

    @property
    def description(self) -> str:
        """See `Reference`."""
        return self.images.source.description

    def batches(self, places: range, size: int) -> Iterator[np.ndarray]:
        """See `Reference.batches`."""
        for start in range(places.start, places.stop, size):
            yield self.images.images(range(start, min(start + size, places.stop)))


def read_npz(path: str | os.PathLike) -> StoredReference:
    """Reads reference statistics. Images are read later, by `StoredReference.batches`.

    Args:
      path: the npz file.

    Raises:
      DataError: no npz file, or arrays of other names, shapes or types; the message has those that were found.
    """
    path = os.fspath(path)
    try:
        with zipfile.ZipFile(path) as archive:
            found = {}
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    found[entry.filename.removesuffix(".npy")] = _header(file)
        arrays = {}
        if MEAN in found and COVARIANCE in found:
            with np.load(path, allow_pickle=False) as file:
                _check(path, found)
                arrays = {name: file[name].astype(np.float64) for name in (MEAN, COVARIANCE)}
        elif IMAGES in found:
            _check(path, found)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"config.reference={path} cannot be read: {error}. Expected an npz file of reference statistics, such as "
            "VIRTUAL_imagenet256_labeled.npz of ADM; get it again."
        ) from error
    if not arrays and IMAGES not in found:
        raise DataError(
            f"config.reference={path} has the arrays {_described(found)}; expected {MEAN} and {COVARIANCE}, the "
            f"statistics of Inception's features, or {IMAGES}, images."
        )
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise DataError(f"config.reference={path} has values of {MEAN} or {COVARIANCE} that are not finite.")
    statistics = frechet.stored(arrays[MEAN], arrays[COVARIANCE]) if arrays else None
    shape, _ = found.get(IMAGES, ((0, 0, 0, 3), None))
    return StoredReference(path, shape[0], statistics, shape)


def read_images(options: DataOptions, split: str, labels: Labels | None) -> ImageReference:
    """Finds the readable images of a split, each of them once.

    Args:
      options: the data; `image_size` is the size of the images.
      split: the split.
      labels: the classes, which the captions name; None if labels are not needed.

    Raises:
      DataError: no such data or no readable image, or with `labels` an image without a class.
    """
    source, indices, classes = open_source(options, split), [], []
    for index, record in read_examples(source, range(len(source)), options.limits):
        if isinstance(record, UnreadableExample):
            logging.warning("Left out of the evaluation: %s", record)
            continue
        indices.append(index)
        if labels is not None:
            classes.append(_class_of(record, labels))
    if not indices:
        raise DataError(f"{source.description} has no readable image to compare with.")
    choice = Choice(split, "first")
    images = TestSet(
        (), np.zeros(0, np.int64), np.array(indices), None, source, options.image_size, choice, options.limits,
        options.fit,
    )  # fmt: skip
    return ImageReference(images, None if labels is None else np.array(classes))


def _class_of(record: Record, labels: Labels) -> int:
    try:
        return labels.encode(decode_captions(record)[0], max_length=1)[0][0]
    except DataError as error:
        raise DataError(
            f"{record.name} has no class, which config.metrics.classifier needs: {error} Set it to False, or give "
            "images whose captions or folders name the model's classes."
        ) from error


def _header(file: zipfile.ZipExtFile) -> tuple[tuple[int, ...], np.dtype]:
    """Reads the header of an array in an npz file: its shape and its type."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    if fortran_order and len(shape) > 2:
        raise ValueError("its images are in Fortran's order")
    return shape, dtype


def _check(path: str, found: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Checks the shapes and types of the arrays that are read."""
    for name, expected in _SHAPES.items():
        if name in found and (found[name][0] != expected or found[name][1].kind != "f"):
            raise DataError(
                f"config.reference={path} has {_described({name: found[name]})}; expected float {expected}."
            )
    if IMAGES in found:
        shape, dtype = found[IMAGES]
        if len(shape) != 4 or shape[-1] != 3 or not shape[0] or dtype != np.uint8:
            raise DataError(
                f"config.reference={path} has {_described({IMAGES: found[IMAGES]})}; expected uint8 (P, H, W, 3)."
            )


def _described(found: dict[str, tuple[tuple[int, ...], np.dtype]]) -> str:
    return ", ".join(f"{name}: {dtype} {shape}" for name, (shape, dtype) in sorted(found.items())) or "(none)"
