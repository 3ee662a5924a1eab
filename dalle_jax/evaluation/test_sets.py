"""What a model is measured on: the captions that it draws, and the real pictures that its own are compared with.

DALL-E (section 3.1) draws 30,000 captions of MS-COCO's validation split and all unique captions of CUB's test split,
and does not say which 30,000, nor with which real pictures they are compared. Here:

    "first"   the first caption of each picture, in the split's order
    "drawn"   pictures drawn without replacement, and of each one caption drawn from its own
    "unique"  every caption of the split once, with the first picture that has it

and the real side are the pictures that the captions were taken from, each of them once; for "unique" these are all
readable pictures of the split. A result is worth as much as what is written beside it: see `TestSet.describe`.

    C captions    P pictures    H, W their size
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from dalle_jax.configuration.options import check, from_config
from dalle_jax.data.augment import augment
from dalle_jax.data.builders.shapes_captions.scenes import Scene
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, Source, UnreadableExample, decode_captions, decode_image
from dalle_jax.errors import DataError

CAPTIONS = ("first", "drawn", "unique")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Which captions.

    Attributes:
      split: of the data set.
      captions: "first", "drawn" or "unique"; see the module.
      count: C; None for all that there are.
      seed: of "drawn".
    """

    split: str
    captions: str = "first"
    count: int | None = None
    seed: int = 0

    def __post_init__(self):
        check(self, "", positive=["count"], choices={"captions": CAPTIONS})


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Captions with their pictures, which are read when asked for: a test set need not fit into memory.

    Attributes:
      captions: C of them.
      owners: int [C], each caption's picture, as a place in `pictures`.
      pictures: int [P], the real pictures, as places in `source`.
      scenes: what each caption states, for the embedded shapes; None for other data.
      source, image_size: where pictures are read, and H = W, pixels.
      protocol: what was asked for.
    """

    __test__ = False  # of a test runner: not a class of tests

    captions: tuple[str, ...]
    owners: np.ndarray
    pictures: np.ndarray
    scenes: tuple[Scene, ...] | None
    source: Source
    image_size: int
    protocol: Protocol

    def images(self, places: Sequence[int]) -> np.ndarray:
        """Real pictures, as a prior's training saw them without augmentation (centre square, area average).

        Args:
          places: in `pictures`, B of them.

        Returns:
          uint8 [B, H, W, 3].
        """
        shown = [decode_image(self.source.record(int(self.pictures[place]))) for place in places]
        return np.stack([augment(image, self.image_size, "none", None) for image in shown])

    def describe(self) -> dict[str, Any]:
        """For the report: what another implementation has to take to measure the same."""
        return {
            "data": self.source.description,
            "captions": f"{len(self.captions)}, {self.protocol.captions}",
            "captions_sha256": hashlib.sha256("\n".join(self.captions).encode()).hexdigest(),
            "real_pictures": len(self.pictures),
            "image_size": self.image_size,
            "real_pictures_prepared": "centre square, area average",
        }


def open_test_set(data: Mapping[str, Any], protocol: Protocol, image_size: int | None = None) -> TestSet:
    """Chooses captions and pictures. Every picture is decoded once here, so that damaged ones are known beforehand.

    Args:
      data: a `data` section, of a training's configuration for instance.
      protocol: which.
      image_size: H = W; None: the section's.

    Raises:
      DataError: there are fewer captions than asked for, or none.
    """
    options = from_config(
        DataOptions, {**data, "augment": "none"} | ({"image_size": image_size} if image_size else {}), "data"
    )
    source = open_source(options, protocol.split)
    rng = np.random.default_rng(protocol.seed)
    order = rng.permutation(len(source)) if protocol.captions == "drawn" else range(len(source))
    captions, owners, pictures, scenes = {}, [], [], []
    for index in order:
        if protocol.captions != "unique" and len(pictures) == protocol.count:
            break
        try:
            record = source.record(int(index))
            decode_image(record)
            found = decode_captions(record)
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
                owners.append(len(pictures))
                if "scene" in record.extra:
                    scenes.append(Scene.from_json(record.extra["scene"]))
        pictures.append(int(index))
    if not captions or len(captions) < (protocol.count or 0):
        raise DataError(
            f"{source.description} has {len(captions)} captions of readable pictures, {protocol.count or 'some'} are "
            "asked for: lower config.count."
        )
    return TestSet(
        tuple(captions.values()), np.array(owners), np.array(pictures), tuple(scenes) or None, source,
        options.image_size, protocol,
    )  # fmt: skip
