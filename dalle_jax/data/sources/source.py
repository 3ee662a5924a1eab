"""The random-access interface of every kind of source of images and captions.

A source returns `Record`s of encoded bytes. Reading captions alone therefore does not decode images, and training an
image tokenizer does not decode captions. `source[i]` decodes everything. It raises `UnreadableExample`, with the reason
under which the pipeline counts it, if anything cannot be read.

    H, W image size
"""

from __future__ import annotations

import abc
import dataclasses
import io
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from dalle_jax.configuration.options import check
from dalle_jax.errors import ConfigError, DataError

_AUGMENTS = ("none", "dvae", "prior")
_CAPTION_LINES = ("all", "first")
_CAPTION_FROM = ("files", "file_names", "folder_names")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The data to read, and how to turn it into examples.

    Attributes:
      source: "shapes_captions", "emoji_captions", "folder", "tar_shards", "coco_captions", "cub_captions", or any
        other TFDS name ("name:1.0.0", …).
      image_size: height and width of the images in a batch, in pixels.
      augment: "none" (centre square, resized), "dvae" or "prior" (see augment.py); in training only.
      path: depends on source. "folder": the folder of images. "tar_shards": the folder of shards, or a glob.
        "coco_captions" and "cub_captions": your local copy of the data set (TFDS's `manual_dir`), until it is prepared.
      data_dir: directory of TFDS's prepared data sets; None means $DALLE_JAX_DATA or ~/.cache/dalle_jax/data.
      image_key: the TFDS feature that holds the image; "a/b" reads a nested feature.
      caption_key: the TFDS feature that holds the caption or captions, in the same notation.
        "folder": both keys are columns of the captions table. Their defaults stand for the usual names.
      caption_lines: "folder": which lines of a caption's text file are captions, "all" or the "first" one.
      caption_from: "folder": captions come from "files" (text files or a table), or are made from "file_names"
        (`big_red-dog_01.png` becomes "big red dog") or from "folder_names" (the name of the image's folder).
      builder_kwargs: keyword arguments of the TFDS builder (the font, the image size, …).
      train_split: the split to train on.
      eval_split: the split to evaluate on.
      cache: keep decoded examples in memory, per worker process; for data sets that fit there.
      workers: number of processes that create batches; 0 uses two threads of this process.
      bpe_dropout: the probability that a BPE merge is dropped, in training.
    """

    source: str = "shapes_captions"
    image_size: int = 32
    augment: str = "none"
    path: str | None = None
    data_dir: str | None = None
    image_key: str = "image"
    caption_key: str = "caption"
    caption_lines: str = "all"
    caption_from: str = "files"
    builder_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_split: str = "train"
    eval_split: str = "validation"
    cache: bool = False
    workers: int = 0
    bpe_dropout: float = 0.0

    def __post_init__(self):
        check(
            self, "data", positive=["image_size"], at_least_0=["workers"], below_1=["bpe_dropout"],
            choices={"augment": _AUGMENTS, "caption_lines": _CAPTION_LINES, "caption_from": _CAPTION_FROM},
        )  # fmt: skip
        for key, usual in (("caption_lines", "all"), ("caption_from", "files")):
            if self.source != "folder" and getattr(self, key) != usual:
                raise ConfigError(
                    f"config.data.{key} is {getattr(self, key)!r}, which only config.data.source='folder' can use; "
                    f"the source is {self.source!r}. Set config.data.{key} to {usual!r}."
                )
        if self.source in ("folder", "tar_shards") and not self.path:
            held = "images" if self.source == "folder" else "shards"
            raise ConfigError(
                f"config.data.source is {self.source!r}, which needs config.data.path: the {held}' folder."
            )


class UnreadableExample(DataError):
    """One example that must be skipped.

    Attributes:
      reason: the heading under which it is counted, a few words.
      name: the example's name.
      detail: what was found, or "".
    """

    def __init__(self, reason: str, name: str, detail: str = ""):
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.name, self.detail = reason, name, detail

    def __reduce__(self):
        return UnreadableExample, (self.reason, self.name, self.detail)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Examples that a data set lacks: damaged originals of a prepared one, or files and rows of a folder.

    Attributes:
      reason: the heading under which they are counted, a few words.
      count: number of examples left out, or of files with many examples.
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
      name: the example's name, for messages.
      extra: the other features of the example (text as str, numbers and arrays as numpy).
    """

    image: bytes | np.ndarray
    captions: tuple[str | bytes, ...]
    name: str
    extra: Mapping[str, Any]


def decode_image(record: Record) -> np.ndarray:
    """Decodes the image: upright, RGB, transparent parts on white.

    Args:
      record: the example.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UnreadableExample: if the bytes are not a complete image.
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
    """Decodes the captions, without those that are empty or not UTF-8.

    Args:
      record: the example.

    Returns:
      At least one caption.

    Raises:
      UnreadableExample: if no caption is left.
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
    """Random access to examples. Subclasses define their number and how to read one.

    Attributes:
      description: the source and its split, for messages.
      identity: a text that changes with the examples; None if changes cannot be seen.
      left_out: examples that are known to be missing.
      other_files: number of files passed over, by ending in lower case ({".svg": 248}).
      captions_missing: why no example has a caption, and the remedy; None if some may have one.
    """

    description: str
    identity: str | None = None
    left_out: tuple[LeftOut, ...] = ()
    other_files: Mapping[str, int] = types.MappingProxyType({})
    captions_missing: str | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns the number of examples, readable or not."""

    @abc.abstractmethod
    def record(self, index: int) -> Record:
        """Reads one example without decoding it.

        Args:
          index: in [0, len(self)).

        Raises:
          UnreadableExample: if it cannot be read.
        """

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decodes one example in full.

        Args:
          index: in [0, len(self)).

        Returns:
          {"image": uint8 [H, W, 3], "captions": list of str, "name": str, "extra": dict of other features}.

        Raises:
          IndexError: if there is no such example.
          UnreadableExample: if image or captions cannot be read.
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
        """Yields all readable captions of every example in order, without decoding images."""
        for index in range(len(self)):
            try:
                yield from decode_captions(self.record(index))
            except UnreadableExample:
                continue
