"""Real pictures on any machine: the colour emoji of an installed font, captioned with their Unicode names.

train       everything else
validation  a random tenth: emoji that training never sees at all
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

from dalle_jax.data.builders.emoji_captions import drawing, names


@dataclasses.dataclass(eq=False, kw_only=True)
class EmojiConfig(tfds.core.BuilderConfig):
    """What the pictures on disk depend on; the name tells configurations apart there.

    Attributes:
      image_size: height and width in pixels.
      font: path of the font's file; None looks where systems install NotoColorEmoji.ttf.
      seed: of the splits.
    """

    name: str = dataclasses.field(init=False)
    image_size: int = 32
    font: str | None = None
    seed: int = 0

    def __post_init__(self):
        self.font = str(drawing.find_font(self.font))
        with open(self.font, "rb") as file:
            checksum = zlib.crc32(file.read())
        self.name = f"{self.image_size}px_font{checksum:08x}_seed{self.seed}"


class Builder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder `emoji_captions`; keyword arguments are those of `EmojiConfig`.

    Features: `image` (PNG), `caption` (several, the name first), `name`, `sequence` (the emoji itself),
    `role`, `gender` and `tone` (empty where the emoji has none).  `info.metadata` counts what the font cannot
    draw.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        config: EmojiConfig | None = None,
        file_format: str = "array_record",
        data_dir=None,
        version=None,
        **options: Any,
    ):
        config = config or EmojiConfig(**options)
        super().__init__(config=config, file_format=file_format, data_dir=data_dir, version=version)

    def _create_builder_config(self, builder_config, version):
        return builder_config  # TFDS would warn, at every opening, of all not listed in advance

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
        pictures, same = {}, collections.defaultdict(list)
        candidates = names.all_emoji()
        for item in candidates:
            picture = font.draw(item.sequence)
            if picture is not None:
                same[hashlib.sha1(picture.tobytes()).digest()].append(item.sequence)
                pictures[item.sequence] = _png(picture, options.image_size)
        skipped = [item.name for item in candidates if item.sequence not in pictures]
        logging.info("%d emoji drawn, %d unknown to %s", len(pictures), len(skipped), options.font)
        self.info.metadata.update(drawn=len(pictures), skipped=len(skipped))
        shared = [sequence for sequences in same.values() if len(sequences) > 1 for sequence in sequences]
        drawn = [item for item in candidates if item.sequence in pictures]
        splits = names.split_emoji(drawn, shared, options.seed)
        return {split: self._generate_examples(items, pictures) for split, items in splits.items()}

    def _generate_examples(self, items: list[names.Emoji], pictures: dict[str, bytes]):
        for item in items:
            yield (
                item.sequence,
                {
                    "image": io.BytesIO(pictures[item.sequence]),  # an array would make TFDS import TensorFlow
                    "caption": list(item.captions()),
                    **{key: getattr(item, key) for key in ("name", "sequence", "role", "gender", "tone")},
                },
            )


def _png(picture: PIL.Image.Image, image_size: int) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(drawing.shrink(picture, image_size)).save(file, format="png")
    return file.getvalue()
