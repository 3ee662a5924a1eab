"""Drawn images on any machine: the colour emoji of an installed font, with their Unicode names as captions.

train       all other emoji
validation  a random tenth: emoji that training never sees
heldout     combinations of role, gender and skin tone that training never sees (see names.py)
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import zlib
from typing import Any

import PIL.Image
import tensorflow_datasets as tfds
from absl import logging

from dalle_jax.configuration.values import check_seed, natural
from dalle_jax.data.builders.configured import ConfiguredBuilder
from dalle_jax.data.builders.emoji_captions import drawing, names


@dataclasses.dataclass(eq=False, kw_only=True)
class EmojiConfig(tfds.core.BuilderConfig):
    """Everything that the images on disk depend on. The name distinguishes configurations there.

    Attributes:
      image_size: height and width in pixels.
      font: path of the font's file; None searches for NotoColorEmoji.ttf in the usual folders.
      seed: seed of the splits.
    """

    name: str = dataclasses.field(init=False)
    image_size: int = 32
    font: str | None = None
    seed: int = 0

    def __post_init__(self):
        natural("config.data.builder_kwargs.image_size", self.image_size, 1, 2**12)
        check_seed(self.seed, "config.data.builder_kwargs.seed")
        self.font = str(drawing.find_font(self.font))
        with open(self.font, "rb") as file:
            checksum = zlib.crc32(file.read())
        self.name = f"{self.image_size}px_font{checksum:08x}_seed{self.seed}"


class Builder(ConfiguredBuilder, tfds.core.GeneratorBasedBuilder):
    """TFDS builder `emoji_captions`; keyword arguments are those of `EmojiConfig`.

    Features: `image` (PNG), `caption` (several, the name first), `name`, `sequence` (the emoji itself), `role`,
    `gender` and `tone` (empty if the emoji has none). `info.metadata` counts the emoji that the font cannot draw.
    """

    VERSION = tfds.core.Version("1.0.0")
    CONFIG = EmojiConfig

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "caption": tfds.features.Sequence(tfds.features.Text()),
                    **{key: tfds.features.Text() for key in ("name", "sequence", "role", "gender", "tone")},
                }
            ),
            metadata=tfds.core.MetadataDict(),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager) -> dict[str, Any]:
        options = self.builder_config
        font = drawing.EmojiFont(drawing.find_font(options.font))
        images, same = {}, collections.defaultdict(list)
        candidates = names.all_emoji()
        for item in candidates:
            drawn = font.draw(item.sequence)
            if drawn is not None:
                same[hashlib.sha1(drawn.tobytes()).digest()].append(item.sequence)
                images[item.sequence] = _png(drawn, options.image_size)
        skipped = [item.name for item in candidates if item.sequence not in images]
        logging.info("%d emoji drawn, %d unknown to %s", len(images), len(skipped), options.font)
        self.info.metadata.update(drawn=len(images), skipped=len(skipped))
        shared = [sequence for sequences in same.values() if len(sequences) > 1 for sequence in sequences]
        known = [item for item in candidates if item.sequence in images]
        splits = names.split_emoji(known, shared, options.seed)
        return {split: self._generate_examples(items, images) for split, items in splits.items()}

    def _generate_examples(self, items: list[names.Emoji], images: dict[str, bytes]):
        for item in items:
            yield (
                item.sequence,
                {
                    "image": io.BytesIO(images[item.sequence]),  # TFDS would import TensorFlow for an array
                    "caption": list(item.captions()),
                    **{key: getattr(item, key) for key in ("name", "sequence", "role", "gender", "tone")},
                },
            )


def _png(drawn: PIL.Image.Image, image_size: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(drawing.shrink(drawn, image_size)).save(file, format="png")
    return file.getvalue()
