"""Where pictures and captions come from: one random-access interface over every kind of source.

A source yields `Record`s (encoded bytes, nothing decoded yet), because training on captions alone must not
pay for decoding pictures, nor the image tokenizer for captions.  `source[i]` decodes everything and is
strict: what cannot be read raises `UnreadableExample`, which carries the reason under which the pipeline
counts it.

    H, W picture size
"""

from __future__ import annotations

import abc
import dataclasses
import io
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from dalle_jax.configuration.options import check
from dalle_jax.errors import ConfigError, DataError

_AUGMENTS = ("none", "dvae", "prior")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to read, and how to make examples of it.

    Attributes:
      source: "shapes_captions", "emoji_captions", "folder", "tar_shards", "coco_captions", "cub_captions", or any
      other TFDS name ("name:1.0.0", …).
      image_size: height and width of the pictures in a batch.
      augment: "none" (centre square, resized), "dvae" or "prior" (see augment.py); in training only.
      path: the folder of pictures, where source is "folder"; the folder (or a glob) of shards, where it is
      "tar_shards"; the user's own copy of the data set, where it is "coco_captions" or "cub_captions" and has not
      been prepared before (TFDS's `manual_dir`).
      data_dir: where TFDS keeps its data; None means $DALLE_JAX_DATA or ~/.cache/dalle_jax/data.
      image_key: the TFDS feature that holds the picture; "a/b" reaches into a nested feature.
      caption_key: the TFDS feature that holds the caption or captions, in the same notation.
      builder_kwargs: passed to the TFDS builder (the font, the picture size, …).
      train_split: the split to train on.
      eval_split: the split to evaluate on.
      cache: keep what has been decoded in memory, per worker process; for data sets that fit there.
      workers: processes that make batches; 0 makes them in two threads of this process.
      bpe_dropout: the chance for a BPE merge to be dropped, in training.
    """

    source: str = "shapes_captions"
    image_size: int = 32
    augment: str = "none"
    path: str | None = None
    data_dir: str | None = None
    image_key: str = "image"
    caption_key: str = "caption"
    builder_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_split: str = "train"
    eval_split: str = "validation"
    cache: bool = False
    workers: int = 0
    bpe_dropout: float = 0.0

    def __post_init__(self):
        check(
            self, "data", positive=["image_size"], at_least_0=["workers"], below_1=["bpe_dropout"],
            choices={"augment": _AUGMENTS},
        )  # fmt: skip
        if self.source in ("folder", "tar_shards") and not self.path:
            held = "images" if self.source == "folder" else "shards"
            raise ConfigError(
                f"config.data.source is {self.source!r}, which needs config.data.path: the {held}' folder."
            )


class UnreadableExample(DataError):
    """One example that has to be skipped.

    Attributes:
      reason: the heading under which it is counted, a few words.
      name: which example.
    """

    def __init__(self, reason: str, name: str, detail: str = ""):
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.name, self.detail = reason, name, detail

    def __reduce__(self):
        return UnreadableExample, (self.reason, self.name, self.detail)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """What a data set lacks since it was made, because the files that it was made from were damaged.

    Attributes:
      reason: the heading under which it is counted, a few words.
      count: how many examples, or files of many, were left out.
      names: the first of them, with what was found.
    """

    reason: str
    count: int
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as stored.

    Attributes:
      image: encoded bytes (PNG, JPEG, …), or uint8 [H, W, 3 or 1].
      captions: zero or more captions, as text or as bytes that should be UTF-8.
      name: which example this is, for messages.
      extra: the other features of the example (text as str, numbers and arrays as numpy).
    """

    image: bytes | np.ndarray
    captions: tuple[str | bytes, ...]
    name: str
    extra: Mapping[str, Any]


def decode_image(record: Record) -> np.ndarray:
    """Decodes the picture: upright, RGB, transparent parts on white.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UnreadableExample: where the bytes are not a whole picture.
    """
    if isinstance(record.image, np.ndarray):
        if record.image.dtype != np.uint8 or record.image.ndim != 3 or record.image.shape[-1] not in (1, 3):
            found = f"{record.image.dtype} {record.image.shape}"
            raise UnreadableExample("unreadable image", record.name, found)
        return np.broadcast_to(record.image, (*record.image.shape[:2], 3))
    try:
        with PIL.Image.open(io.BytesIO(record.image)) as image:
            image = PIL.ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except Exception as error:  # Pillow raises anything from OSError to SyntaxError on damaged bytes
        found = f"{type(error).__name__}: {error}"
        raise UnreadableExample("unreadable image", record.name, found) from error


def decode_captions(record: Record) -> list[str]:
    """Decodes the captions, leaving out those that are empty or not UTF-8.

    Returns:
      At least one caption.

    Raises:
      UnreadableExample: where none is left.
    """
    captions, undecodable = [], False
    for caption in record.captions:
        try:
            text = caption.decode("utf-8-sig") if isinstance(caption, bytes) else caption
        except UnicodeDecodeError:
            undecodable = True
            continue
        if text.strip():
            captions.append(text)
    if not captions:
        raise UnreadableExample("undecodable text" if undecodable else "empty caption", record.name)
    return captions


class Source(abc.ABC):
    """Random access to examples.  Subclasses say how many there are and how one is read.

    Attributes:
      description: what this is, for messages.
      identity: a text that no other examples have, where these can never change; else None.
      left_out: what is known to be missing in it.
    """

    description: str
    identity: str | None = None
    left_out: tuple[LeftOut, ...] = ()

    @abc.abstractmethod
    def __len__(self) -> int:
        """How many examples there are, readable or not."""

    @abc.abstractmethod
    def record(self, index: int) -> Record:
        """Reads example `index` without decoding it.

        Raises:
          UnreadableExample: where it cannot even be read.
        """

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decodes one example in full.

        Args:
          index: in [0, len(self)).

        Returns:
          {"image": uint8 [H, W, 3], "captions": list of str, "name": str, "extra": dict of other features}.

        Raises:
          IndexError: where there is no such example.
          UnreadableExample: where picture or caption cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"Example {index} of {len(self)} in {self.description}.")
        record = self.record(index)
        return {
            "image": decode_image(record),
            "captions": decode_captions(record),
            "name": record.name,
            "extra": dict(record.extra),
        }

    def captions(self) -> Iterator[str]:
        """All readable captions in order, every one of each example; no picture is decoded."""
        for index in range(len(self)):
            try:
                yield from decode_captions(self.record(index))
            except UnreadableExample:
                continue
