"""Looks at a data set without training: how many images and captions, of which kind, and what is left out.

A survey reads all records of a small split and an evenly spread part of a large one. It says how many it looked at.
The number of examples is always exact.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dalle_jax.data.augment import centre_square, fit_square
from dalle_jax.data.caption_statistics import CaptionStatistics, measure_captions
from dalle_jax.data.sources.decoding import Header, Limits, decode_image, read_header
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.own import choose_source
from dalle_jax.data.sources.record import Record, UnreadableExample
from dalle_jax.data.sources.source import DataOptions, Source, decode_captions
from dalle_jax.data.spread import in_spread_order
from dalle_jax.data.text import CaptionModel
from dalle_jax.errors import DataError

SPLITS = ("train", "validation")
CAPTIONS = ("required", "counted", "ignored")
_ALWAYS_READ = 100  # records of a split that are read and decoded whatever their size
_AT_ONCE = 32  # records in memory
_THREADS = 4  # remote storage answers slowly
_NAMED = 3  # images of a single colour
_LONG = 1.5  # ratio of the sides from which a third is lost to the centre square


@dataclasses.dataclass(frozen=True)
class Effort:
    """The most that a survey reads of each split; at least 100 records are read and decoded.

    Attributes:
      records: number of records.
      file_bytes: bytes of encoded images.
      pixels: pixels to decode. Of further images only the header is read, so damage in them is not seen.
    """

    records: int = 2000
    file_bytes: int = 4 * 2**30
    pixels: int = 400_000_000


THOROUGH = Effort()
QUICK = Effort(file_bytes=200 * 2**20, pixels=30_000_000)  # about two seconds
GLANCE = Effort(records=200)


@dataclasses.dataclass(frozen=True)
class SplitSurvey:
    """One split.

    Attributes:
      split: its name in the data set.
      examples: number of examples, readable or not.
      looked_at: number of examples that were read.
      decoded: number of them whose image was decoded.
      with_captions: number of examples with a caption; estimated if not all examples were read.
      captions: number of captions; estimated in the same way.
      left_out: examples that cannot be used, by reason: those that the source lacks, and those found by reading.
    """

    split: str
    examples: int
    looked_at: int
    decoded: int
    with_captions: int
    captions: int
    left_out: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class ImageSurvey:
    """The images of both splits that were read.

    Attributes:
      smallest, median, largest: (width, height) in pixels, by area.
      below_image_size: number of images whose short side is below `data.image_size`; they are enlarged.
      cropped: number of images that lose more than a third to the centre square.
      blank: number of decoded images whose centre square has a single colour.
      blank_names: the first three of them.
      formats: number of images by file format ("PNG", …; "array" if they are stored decoded).
      modes: number of images by Pillow's mode ("RGB", "RGBA", "L", …).
      duplicates: number of images whose bytes equal those of an earlier one.
      in_both_splits: number of validation images whose bytes are those of a training image.
    """

    smallest: tuple[int, int]
    median: tuple[int, int]
    largest: tuple[int, int]
    below_image_size: int
    cropped: int
    blank: int
    blank_names: tuple[str, ...]
    formats: Mapping[str, int]
    modes: Mapping[str, int]
    duplicates: int
    in_both_splits: int


@dataclasses.dataclass(frozen=True)
class Survey:
    """A data set.

    Attributes:
      source: `data.source`.
      path: `data.path`, or None.
      splits: "train" and "validation", which are `data.train_split` and `data.eval_split`.
      other_files: number of files that are no images or captions, by ending in lower case.
      images: see `ImageSurvey`.
      captions: see `CaptionStatistics`; None without captions.
    """

    source: str
    path: str | None
    splits: Mapping[str, SplitSurvey]
    other_files: Mapping[str, int]
    images: ImageSurvey
    captions: CaptionStatistics | None

    def to_dict(self) -> dict[str, Any]:
        """Returns the survey as plain JSON."""
        return dataclasses.asdict(self)


def survey(
    options: DataOptions,
    sources: Mapping[str, Source] | None = None,
    *,
    text_length: int | None = None,
    text_model: CaptionModel | None = None,
    vocab_size: int | None = None,
    captions: str = "counted",
    effort: Effort = THOROUGH,
) -> Survey:
    """Looks at the training and the validation split of a data set.

    Args:
      options: what to read.
      sources: the open splits by the names in `SPLITS`; None opens them, see `open_splits`.
      text_length: T, the length at which captions are cut; None if it is not known.
      text_model: counts tokens. None trains a temporary model on the captions that were read.
      vocab_size: V of that model; None chooses one that holds all letters.
      captions: "required" (an example without a caption is left out, and a split without any is an error), "counted"
        (no error), or "ignored" (such examples are not left out either).
      effort: the most to read.

    Returns:
      The survey.

    Raises:
      DataError: the data set cannot be opened, no image of a split can be read, or a required caption is missing.
      ConfigError: `vocab_size` is too small for the captions.
    """
    if sources is None:
        options = dataclasses.replace(options, source=choose_source(options.source, options.path))
        sources = open_splits(options)
    looks = {name: _look(source, options, effort) for name, source in sources.items()}
    splits = {
        name: _split(sources[name], split, looks[name], captions)
        for name, split in zip(SPLITS, (options.train_split, options.eval_split))
    }
    for name, source in sources.items():
        _check_usable(source, splits[name], looks[name], captions)
    every = [look for each in looks.values() for look in each]
    images = _images(looks, options)
    found = measure_captions([look.captions for look in every], text_length, text_model, vocab_size)
    other_files = dict(sources["train"].other_files)
    return Survey(options.source, options.path, splits, other_files, images, found)


def open_splits(options: DataOptions) -> dict[str, Source]:
    """Opens the training and the validation split, by the names in `SPLITS`.

    Raises:
      DataError: see `open_source`.
    """
    return dict(zip(SPLITS, (open_source(options, split) for split in (options.train_split, options.eval_split))))


# -- reading ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Look:
    """One record: its captions, its name, its image's header and hash, and why image or captions cannot be used."""

    captions: tuple[str, ...] = ()
    name: str = ""
    header: Header | None = None
    digest: bytes = b""
    decoded: bool = False
    blank: bool = False
    no_image: str = ""
    no_captions: str = ""
    error: str = ""


def _look(source: Source, options: DataOptions, effort: Effort) -> list[_Look]:
    """Reads records of a split, in the order of the source."""
    order = list(itertools.islice(in_spread_order(len(source)), effort.records))
    looks, file_bytes, pixels = {}, 0, 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(order), _AT_ONCE):
            if start >= _ALWAYS_READ and file_bytes > effort.file_bytes:
                break
            chunk = order[start : start + _AT_ONCE]
            records = list(pool.map(lambda index: _record(source, index), chunk))
            found, decode = list(pool.map(_without_pixels, records, itertools.repeat(options.limits))), []
            for place, look in enumerate(found):
                pixels += math.prod(look.header.size) if look.header else 0
                decode.append(pixels <= effort.pixels or start + place < _ALWAYS_READ)
            decoded = pool.map(_decoded, records, found, decode, itertools.repeat(options))
            looks.update(zip(chunk, decoded))
            file_bytes += sum(len(each.image) for each in records if isinstance(each, Record))
    return [looks[index] for index in sorted(looks)]


def _record(source: Source, index: int) -> Record | UnreadableExample:
    try:
        return source.record(index)
    except UnreadableExample as error:
        return error


def _without_pixels(record: Record | UnreadableExample, limits: Limits) -> _Look:
    """Reads everything of a record but the pixels of its image."""
    if isinstance(record, UnreadableExample):
        return _Look(no_image=record.reason, error=str(record))
    captions, no_captions, error = (), "", ""
    try:
        captions = tuple(decode_captions(record))
    except UnreadableExample as unreadable:
        no_captions, error = unreadable.reason, str(unreadable)
    image = record.image.tobytes() if isinstance(record.image, np.ndarray) else record.image
    digest = hashlib.blake2b(image, digest_size=16).digest()
    header = read_header(record, limits)
    return _Look(captions, record.name, header, digest, no_captions=no_captions, error=error)


def _decoded(record: Record | UnreadableExample, look: _Look, decode: bool, options: DataOptions) -> _Look:
    """Returns the look with the result of decoding the image. An image without a readable header is always tried."""
    if isinstance(record, UnreadableExample) or not (decode or look.header is None):
        return look
    try:
        image = decode_image(record, options.limits)
    except UnreadableExample as unreadable:
        return dataclasses.replace(look, no_image=unreadable.reason, error=str(unreadable))
    square = centre_square(fit_square(image, options.fit))
    parts = (square[::16, ::16], square)  # a few pixels are enough for most images
    return dataclasses.replace(look, decoded=True, blank=all(bool((part == square[0, 0]).all()) for part in parts))


# -- summing up ---------------------------------------------------------------------------------------------------


def _split(source: Source, split: str, looks: Sequence[_Look], captions: str) -> SplitSurvey:
    left_out = collections.Counter({found.reason: found.count for found in source.left_out})
    for look in looks:
        if reason := look.no_image or (look.no_captions if captions != "ignored" else ""):
            left_out[reason] += 1
    scale = len(source) / max(len(looks), 1)
    return SplitSurvey(
        split=split,
        examples=len(source),
        looked_at=len(looks),
        decoded=sum(look.decoded for look in looks),
        with_captions=round(scale * sum(bool(look.captions) for look in looks)),
        captions=round(scale * sum(len(look.captions) for look in looks)),
        left_out=dict(sorted(left_out.items())),
    )


def _check_usable(source: Source, found: SplitSurvey, looks: Sequence[_Look], captions: str) -> None:
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items())
    tried = f"{source.description}: of {found.examples} examples, {found.looked_at} were read"
    last = next((look.error for look in reversed(looks) if look.error), "")
    if not any(not look.no_image for look in looks):
        raise DataError(
            f"{tried}, and no image is usable ({reasons or 'there are none'}). {last}. "
            "Set config.data.path to the folder of your images, or repair them."
        )
    if captions == "required" and not any(look.captions and not look.no_image for look in looks):
        raise DataError(
            source.captions_missing
            or f"{tried}, and none has a readable caption ({reasons}). {last}. "
            "Captions are read from config.data.caption_key, or from text files and tables in a folder."
        )


def _images(looks: Mapping[str, Sequence[_Look]], options: DataOptions) -> ImageSurvey:
    seen = {name: [look for look in each if look.header and not look.no_image] for name, each in looks.items()}
    every = [look for each in seen.values() for look in each]
    sizes = sorted((look.header.size for look in every), key=lambda size: (math.prod(size), size))
    training = {look.digest for look in seen["train"]}
    return ImageSurvey(
        smallest=sizes[0],
        median=sizes[(len(sizes) - 1) // 2],
        largest=sizes[-1],
        below_image_size=sum(min(size) < options.image_size for size in sizes),
        cropped=sum(max(size) > _LONG * min(size) for size in sizes) if options.fit == "crop" else 0,
        blank=sum(look.blank for look in every),
        blank_names=tuple(look.name for look in every if look.blank)[:_NAMED],
        formats=dict(collections.Counter(look.header.format for look in every).most_common()),
        modes=dict(collections.Counter(look.header.mode for look in every).most_common()),
        duplicates=len(every) - len({look.digest for look in every}),
        in_both_splits=sum(look.digest in training for look in seen["validation"]),
    )
