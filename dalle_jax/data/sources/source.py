"""The random-access interface of every kind of source of images and captions.

A source returns `Record`s of encoded bytes. Reading captions alone therefore does not decode images, and training an
image tokenizer does not decode captions. `source[i]` decodes everything. It raises `UnreadableExample`, with the reason
under which the pipeline counts it, if anything cannot be read.

    H, W image size
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dalle_jax.configuration.options import check
from dalle_jax.data.augment import FITS, KINDS
from dalle_jax.data.sources.decoding import MOST_PIXELS, Limits, decode_image
from dalle_jax.data.sources.record import Record, UnreadableExample
from dalle_jax.errors import ConfigError

_MOST = {
    "image_size": 2**13,
    "workers": 1024,
    "max_pixels": MOST_PIXELS,
    "max_file_bytes": 2**40,
    "cache_bytes": 2**40,
}
DEFAULT_DATA_DIR = "~/.cache/dalle_jax/data"
_MOST_CHOSEN_WORKERS = 32  # each holds a copy of the program: about 0.3 GB
_CAPTION_LINES = ("all", "first")
_WITHOUT_WORDS = ("label", "none", "clip")  # conditions
_CAPTION_FROM = ("files", "file_names", "folder_names", "paths")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The data to read, and how to turn it into examples.

    Attributes:
      source: "shapes_captions", "emoji_captions", "folder", "tar_shards", "auto" (one of these two, see own.py),
        "coco_captions", "cub_captions", or any other TFDS name ("name:1.0.0", …).
      image_size: height and width of the images in a batch, in pixels.
      fit: how an image that is not square becomes one. "crop" cuts its longer side, "pad" adds white along it.
      augment: "none" (centre square, resized), "dvae", "prior" or "clip" (see augment.py); in training only.
      path: depends on source. "folder": the folder of images. "tar_shards": the folder of shards, or a glob.
        "coco_captions" and "cub_captions": your local copy of the data set (TFDS's `manual_dir`), until it is prepared.
      data_dir: directory of prepared data sets: TFDS's, and the indices of tar shards. None means $DALLE_JAX_DATA or
        ~/.cache/dalle_jax/data.
      image_key: the TFDS feature that holds the image; "a/b" reads a nested feature.
      caption_key: the TFDS feature that holds the caption or captions, in the same notation. The caption of a class
        label is its name.
        "folder": both keys are columns of the captions table. Their defaults stand for the usual names.
      condition: what a prior draws an image from, a key of `priors.registry.CONDITIONS`: "text" (its caption), "label"
        (its class, which its caption names), "clip" (its CLIP embedding), "low_resolution" (its caption and the tokens
        of a smaller copy) or "none".
      caption_lines: "folder": which lines of a caption's text file are captions, "all" or the "first" one.
      caption_from: "folder": captions come from "files" (text files or a table), or are made from "file_names"
        (`big_red-dog_01.png` becomes "big red dog"), "folder_names" (the name of the image's folder) or "paths"
        (both: `signs/hotel/big_bed.png` becomes "signs hotel big bed"). With the condition "label", "folder_names" are
        the whole names of the class folders (class_folders.py).
      builder_kwargs: keyword arguments of the TFDS builder (the font, the image size, …).
      train_split: the split to train on.
      eval_split: the split to evaluate on.
      cache: keep prepared examples in memory, so that each is decoded once; with `workers` in each process.
      cache_bytes: the most memory for the images of one split, in all processes. A larger split is not kept at all.
      workers: number of processes that create batches; 0 uses two threads of this process. None: as many as this
        process may use cores, at most 32, or 0 if the batches hold no images.
      bpe_dropout: the probability that a BPE merge is dropped, in training.
      max_pixels: larger images are skipped before they are decoded.
      max_file_bytes: larger image files and members of archives are skipped before they are read.
    """

    source: str = "shapes_captions"
    image_size: int = 32
    fit: str = "crop"
    augment: str = "none"
    path: str | None = None
    data_dir: str | None = None
    image_key: str = "image"
    caption_key: str = "caption"
    condition: str = "text"
    caption_lines: str = "all"
    caption_from: str = "files"
    builder_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    train_split: str = "train"
    eval_split: str = "validation"
    cache: bool = False
    cache_bytes: int = 2**30
    workers: int | None = 0
    bpe_dropout: float = 0.0
    max_pixels: int = Limits.max_pixels
    max_file_bytes: int = Limits.max_file_bytes

    def __post_init__(self):
        check(
            self, "data", positive=["image_size", "max_pixels", "max_file_bytes", "cache_bytes"],
            at_least_0=["workers"], below_1=["bpe_dropout"], most=_MOST,
            choices={"fit": FITS, "augment": KINDS, "caption_lines": _CAPTION_LINES, "caption_from": _CAPTION_FROM},
        )  # fmt: skip
        if self.bpe_dropout and self.condition in _WITHOUT_WORDS:
            raise ConfigError(
                f"config.data.bpe_dropout is {self.bpe_dropout}, and config.data.condition {self.condition!r} has no "
                "text: give --config.data.bpe_dropout=0."
            )
        for key, usual in (("caption_lines", "all"), ("caption_from", "files")):
            if self.source not in ("auto", "folder") and getattr(self, key) != usual:
                raise ConfigError(
                    f"config.data.{key} is {getattr(self, key)!r}, which only config.data.source='folder' can use; "
                    f"the source is {self.source!r}. Set config.data.{key} to {usual!r}."
                )
        if self.source in ("auto", "folder", "tar_shards") and not self.path:
            held = {"folder": "images", "tar_shards": "shards"}.get(self.source, "images or tar shards")
            raise ConfigError(
                f"config.data.source is {self.source!r}, which needs config.data.path: the folder of your {held}."
            )

    @property
    def names_classes(self) -> bool:
        """Whether the captions of a folder are the names of its class folders, unchanged."""
        return self.condition == "label" and self.caption_from == "folder_names"

    def worker_count(self, *, images: bool = True) -> int:
        """Returns the number of processes that create batches, with or without images."""
        if self.workers is not None:
            return self.workers
        return min(_available_cores(), _MOST_CHOSEN_WORKERS) if images else 0

    @property
    def prepared_dir(self) -> str:
        """The directory of prepared data sets, local or remote."""
        data_dir = self.data_dir or os.environ.get("DALLE_JAX_DATA") or DEFAULT_DATA_DIR
        return data_dir if "://" in data_dir else os.path.expanduser(data_dir)

    @property
    def limits(self) -> Limits:
        """The largest images to decode, and the size of a batch's images."""
        return Limits(self.max_pixels, self.max_file_bytes, self.image_size)


def _available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def sum_left_out(found: Mapping[str, Mapping[str, Any]], splits: Iterable[str]) -> tuple[LeftOut, ...]:
    """Sums up what a prepared data set lacks over some splits.

    Args:
      found: by split and reason, {"count": number of examples, "names": the first of them}.
      splits: the splits to sum over.
    """
    counts, names = collections.Counter(), collections.defaultdict(list)
    for split in splits:
        for reason, each in found.get(split, {}).items():
            counts[reason] += each["count"]
            names[reason] += each["names"]
    return tuple(LeftOut(reason, counts[reason], tuple(names[reason])) for reason in sorted(counts))


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
      image_identity: a text that changes with the images and their order, but not with captions and not when all are
        moved; None if changes cannot be seen.
      left_out: examples that are known to be missing.
      other_files: number of files passed over, by ending in lower case ({".svg": 248}).
      captions_missing: why no example has a caption, and the remedy; None if some may have one.
      limits: the largest image that `source[index]` decodes.
    """

    description: str
    identity: str | None = None
    image_identity: str | None = None
    left_out: tuple[LeftOut, ...] = ()
    other_files: Mapping[str, int] = types.MappingProxyType({})
    captions_missing: str | None = None
    limits: Limits = Limits()

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

    def without_image(self, index: int) -> Record:
        """Returns the same as `record`, with the image b"". A source that can does not read the image."""
        return dataclasses.replace(self.record(index), image=b"")

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
            "image": decode_image(record, self.limits),
            "captions": decode_captions(record),
            "name": record.name,
            "extra": dict(record.extra),
        }

    def captions_of(self, index: int) -> list[str]:
        """Returns the readable captions of one example; [] if there are none. No image is decoded."""
        try:
            return decode_captions(self.without_image(index))
        except UnreadableExample:
            return []

    def captions(self) -> Iterator[str]:
        """Yields all readable captions of every example in order, without decoding images."""
        for index in range(len(self)):
            yield from self.captions_of(index)
