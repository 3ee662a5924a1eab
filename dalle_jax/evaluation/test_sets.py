"""Test sets: the captions that a model draws, and the real images that its images are compared with.

DALL-E (section 3.1) draws 30,000 captions of MS-COCO's validation split and all unique captions of CUB's test split.
The paper does not say which 30,000, nor with which real images they are compared. The choices here:

    "first"   the first caption of each image, in the split's order
    "drawn"   images drawn without replacement, and one caption of each, drawn at random
    "unique"  every caption of the split once, with the first image that has it

The real images are those that the captions were taken from, each of them once. For "unique" these are all readable
images of the split. `TestSet.describe` gives the report what it takes to measure the same.

    C captions    P images    H, W their size
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from absl import logging

from dalle_jax.configuration.options import check, from_config
from dalle_jax.data.augment import augment, fit_square
from dalle_jax.data.builders.shapes_captions.scenes import Scene
from dalle_jax.data.sources.decoding import Limits, decode_image
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.record import Record
from dalle_jax.data.sources.source import DataOptions, Source, UnreadableExample, decode_captions
from dalle_jax.data.text import CaptionEncoder, only_unknown
from dalle_jax.errors import DataError

CAPTIONS = ("first", "drawn", "unique")
_WINDOW = 64  # examples that are read at once
_MOST_THREADS = 32


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which captions to use.

    Attributes:
      split: split of the data set.
      captions: "first", "drawn" or "unique"; see the module.
      count: C, or None for all captions.
      seed: for "drawn".
    """

    split: str
    captions: str = "first"
    count: int | None = None
    seed: int = 0

    def __post_init__(self):
        check(self, "", positive=["count"], seeds=["seed"], choices={"captions": CAPTIONS})


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Captions with their images. Images are read on demand, so that a test set need not fit into memory.

    Attributes:
      captions: C captions.
      owners: int [C], the image of each caption, as an index into `indices`.
      indices: int [P], the real images, as indices into `source`.
      scenes: the content of each caption, for the embedded shapes; None for other data.
      source: where images are read.
      image_size: H = W, pixels.
      protocol: how the captions were chosen.
      limits: the largest image that is decoded.
      fit: how an image becomes a square; see `DataOptions`.
    """

    __test__ = False  # tells pytest that this is not a class of tests

    captions: tuple[str, ...]
    owners: np.ndarray
    indices: np.ndarray
    scenes: tuple[Scene, ...] | None
    source: Source
    image_size: int
    protocol: Protocol
    limits: Limits = Limits()
    fit: str = "crop"

    def images(self, places: Sequence[int]) -> np.ndarray:
        """Reads real images, prepared as in a prior's training without augmentation (centre square, area average).

        Args:
          places: B indices into `indices`.

        Returns:
          uint8 [B, H, W, 3].
        """

        def prepared(record: Record) -> np.ndarray:
            image = fit_square(decode_image(record, self.limits), self.fit)
            return augment(image, self.image_size, "none", None)

        records = [self.source.record(int(self.indices[place])) for place in places]
        return np.stack(list(_threads().map(prepared, records)))

    def describe(self) -> dict[str, Any]:
        """Describes the test set for the report, so that another implementation can measure the same."""
        squares = "centre square" if self.fit == "crop" else "padded to a square"
        return {
            "data": self.source.description,
            "captions": f"{len(self.captions)}, {self.protocol.captions}",
            "captions_sha256": hashlib.sha256("\n".join(self.captions).encode()).hexdigest(),
            "real_images": len(self.indices),
            "image_size": self.image_size,
            "real_images_prepared": f"{squares}, area average",
        }


def open_test_set(
    data: Mapping[str, Any],
    protocol: Protocol,
    image_size: int | None = None,
    text_models: Sequence[CaptionEncoder] = (),
) -> TestSet:
    """Chooses captions and images. Every image is decoded once here, so that damaged ones are left out.

    Args:
      data: a `data` section, for instance of a training's configuration.
      protocol: which captions to use.
      image_size: H = W, pixels, or None for the section's.
      text_models: captions of which one of them knows no letter are left out.

    Returns:
      The test set.

    Raises:
      DataError: fewer captions than `protocol.count`, or none.
    """
    options = from_config(
        DataOptions, {**data, "augment": "none"} | ({"image_size": image_size} if image_size else {}), "data"
    )
    source = open_source(options, protocol.split)
    rng = np.random.default_rng(protocol.seed)
    order = rng.permutation(len(source)) if protocol.captions == "drawn" else range(len(source))
    captions, owners, indices, scenes = {}, [], [], []
    for index, record in read_examples(source, order, options.limits):
        if protocol.captions != "unique" and len(indices) == protocol.count:
            break
        try:
            if isinstance(record, UnreadableExample):
                raise record
            found = [
                caption
                for caption in decode_captions(record)
                if not any(only_unknown(model, caption) for model in text_models)
            ]
            if not found:
                raise UnreadableExample("caption of unknown letters", record.name)
        except UnreadableExample as error:
            logging.warning("Left out of the evaluation: %s", error)
            continue
        if protocol.captions == "first":
            found = found[:1]
        elif protocol.captions == "drawn":
            found = [found[rng.integers(len(found))]]
        for caption in found:
            key = caption if protocol.captions == "unique" else (caption, index)
            if key not in captions and len(captions) != protocol.count:
                captions[key] = caption
                owners.append(len(indices))
                if "scene" in record.extra:
                    scenes.append(Scene.from_json(record.extra["scene"]))
        indices.append(index)
    if not captions or len(captions) < (protocol.count or 0):
        raise DataError(
            f"{source.description} has {len(captions)} captions of readable images, but {protocol.count or 'some'} are "
            "needed: lower config.count."
        )
    return TestSet(
        tuple(captions.values()), np.array(owners), np.array(indices), tuple(scenes) or None, source,
        options.image_size, protocol, options.limits, options.fit,
    )  # fmt: skip


def read_examples(
    source: Source, order: Sequence[int], limits: Limits
) -> Iterator[tuple[int, Record | UnreadableExample]]:
    """Reads examples in order, and decodes the images of `_WINDOW` of them at once, to know whether that works.

    Yields:
      The index of each example, and its record, or the reason why it is unreadable.
    """

    def attempt(function: Callable[[], Record]) -> Record | UnreadableExample:
        try:
            return function()
        except UnreadableExample as error:
            return error

    def decoded(record: Record | UnreadableExample) -> Record | UnreadableExample:
        if not isinstance(record, UnreadableExample):
            decode_image(record, limits)
        return record

    for start in range(0, len(order), _WINDOW):
        window = [int(index) for index in order[start : start + _WINDOW]]
        records = [attempt(functools.partial(source.record, index)) for index in window]
        yield from zip(window, _threads().map(lambda record: attempt(lambda: decoded(record)), records))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    """Returns the threads that decode images. Pillow decodes outside of Python's lock."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS), "decode")
