"""The embedded data set: images of coloured shapes with captions, drawn by numpy.

    train       seen combinations
    validation  seen combinations, unseen images
    heldout     combinations that training never sees (see scenes.py)

Example i of a split is a pure function of (seed, split, i, image_size). A longer training split therefore begins with
the shorter one.
"""

from __future__ import annotations

import dataclasses
import io
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from dalle_jax.configuration.values import check_seed, natural
from dalle_jax.data.builders.configured import ConfiguredBuilder
from dalle_jax.data.builders.shapes_captions import drawing, scenes
from dalle_jax.errors import ConfigError


@dataclasses.dataclass(eq=False, kw_only=True)
class ShapesConfig(tfds.core.BuilderConfig):
    """Everything that the images on disk depend on. The name distinguishes configurations there.

    Attributes:
      image_size: height and width in pixels.
      num_train, num_validation, num_heldout: examples per split.
      classes: draw one object in each image, with its colour and shape as caption. They are 30 classes. There are no
        combinations to hold out, so the held-out split is like the validation split.
      seed: seed of all choices.
    """

    name: str = dataclasses.field(init=False)
    image_size: int = 32
    num_train: int = 8192
    num_validation: int = 512
    num_heldout: int = 512
    classes: bool = False
    seed: int = 0

    def __post_init__(self):
        for key, least, most in (
            ("image_size", 1, 2**12), *((f"num_{split}", 1, 10**7) for split in ("train", "validation", "heldout"))
        ):  # fmt: skip
            natural(f"config.data.builder_kwargs.{key}", getattr(self, key), least, most)
        check_seed(self.seed, "config.data.builder_kwargs.seed")
        if not isinstance(self.classes, bool):
            raise ConfigError(f"config.data.builder_kwargs.classes is {self.classes!r}; expected True or False.")
        sizes = f"{self.num_train}-{self.num_validation}-{self.num_heldout}"
        self.name = f"{self.image_size}px_{sizes}_seed{self.seed}{'_classes' * self.classes}"


class Builder(ConfiguredBuilder, tfds.core.GeneratorBasedBuilder):
    """TFDS builder `shapes_captions`; keyword arguments are those of `ShapesConfig`.

    Features: `image` (PNG), `caption`, `scene` (what the caption states, as `Scene.to_json`).
    """

    VERSION = tfds.core.Version("2.0.0")
    CONFIG = ShapesConfig

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": tfds.features.Text(),
                    "scene": tfds.features.Text(),
                }
            ),
            supervised_keys=None,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        counts = self.builder_config
        return {
            "train": self._generate_examples("train", counts.num_train),
            "validation": self._generate_examples("validation", counts.num_validation),
            "heldout": self._generate_examples("heldout", counts.num_heldout),
        }

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
        options = self.builder_config
        for index in range(count):
            image, caption, stated = make_example(options.seed, split, index, options.image_size, options.classes)
            png = io.BytesIO()  # TFDS would import TensorFlow to encode an array
            PIL.Image.fromarray(image).save(png, format="png", compress_level=1)
            png.seek(0)
            yield index, {"image": png, "caption": caption, "scene": stated.to_json()}


def make_example(
    seed: int, split: str, index: int, image_size: int, classes: bool = False
) -> tuple[np.ndarray, str, scenes.Scene]:
    """Creates one example.

    Args:
      seed: seed of the data set.
      split: "heldout", or any other name for seen combinations.
      index: number of the example in its split.
      image_size: H and W.
      classes: see `ShapesConfig`.

    Returns:
      image: uint8 [H, W, 3].
      caption: lower-case text.
      stated: what the caption states.
    """
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    if classes:
        shown, stated = scenes.draw_class(rng)
        caption = scenes.class_name(stated)
    else:
        shown, stated = scenes.draw_scene(rng, held_out=split == "heldout")
        caption = scenes.write_caption(rng, stated)
    return drawing.draw(shown, image_size), caption, stated
