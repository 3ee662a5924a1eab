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
import importlib
import io
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from dalle_jax.errors import ConfigError, DataError

EMBEDDED = ("shapes_captions", "emoji_captions")
_AUGMENTS = ("none", "dvae", "prior")


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """What to read, and how to make examples of it.

    Attributes:
      source: "shapes_captions", "emoji_captions", "folder", or any TFDS name ("coco_captions", "cub:1.0.0",
      …).
      image_size: height and width of the pictures in a batch.
      augment: "none" (centre square, resized), "dvae" or "prior" (see augment.py); in training only.
      path: the folder, where source is "folder".
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
        if self.augment not in _AUGMENTS:
            raise ConfigError(f"data.augment is {self.augment!r}; expected one of {', '.join(_AUGMENTS)}.")
        if self.image_size < 1:
            raise ConfigError(f"data.image_size is {self.image_size}; expected a positive number of pixels.")
        if self.workers < 0:
            raise ConfigError(f"data.workers is {self.workers}; expected 0 (no processes) or more.")
        if not 0.0 <= self.bpe_dropout < 1.0:
            raise ConfigError(f"data.bpe_dropout is {self.bpe_dropout}; expected a chance in [0, 1).")
        if self.source == "folder" and not self.path:
            raise ConfigError("data.source is 'folder' but data.path is not set: give the pictures' folder.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DataOptions:
        """Reads the `data` part of a config.

        Args:
          config: a mapping (ConfigDict or dict) whose keys are fields of this class.

        Raises:
          ConfigError: where a key is unknown or a value cannot be used.
        """
        values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"Unknown key data.{unknown[0]}; the keys of data are {', '.join(known)}.")
        if values.get("builder_kwargs") is None:
            values.pop("builder_kwargs", None)
        return cls(**values)


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
    """

    description: str
    identity: str | None = None

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


def open_source(options: DataOptions, split: str) -> Source:
    """Opens the source that the options name, building an embedded data set first where need be.

    Args:
      options: what to read.
      split: which part of it ("train", "validation", "heldout", "train[:90%]", …).

    Returns:
      The source.

    Raises:
      DataError: where it does not exist, or lacks the split or the features.
    """
    if options.source == "folder":
        from dalle_jax.data import folder

        return folder.FolderSource(options.path, split)
    return TfdsSource(options, split)


class TfdsSource(Source):
    """A TFDS data set with a picture and a caption feature, stored as ArrayRecord (no TensorFlow)."""

    def __init__(self, options: DataOptions, split: str):
        import tensorflow_datasets as tfds  # takes a second to import; folders do without it

        if options.source in EMBEDDED:
            importlib.import_module(f"dalle_jax.data.{options.source}")
        data_dir = options.data_dir or os.environ.get("DALLE_JAX_DATA") or "~/.cache/dalle_jax/data"
        data_dir = data_dir if "://" in data_dir else os.path.expanduser(data_dir)
        self.description = f"{options.source} ({split})"
        try:
            builder = tfds.builder(
                options.source, data_dir=data_dir, file_format="array_record", **options.builder_kwargs
            )
            builder.download_and_prepare()
            if split.split("[")[0] not in builder.info.splits:
                raise DataError(
                    f"{options.source} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}."
                )
            features = builder.info.features
            for key in (options.image_key, options.caption_key):
                _feature(features, key, options.source)
            # Pictures stay encoded here, so that damaged ones can be counted instead of ending the run.
            decoders = None
            if isinstance(_feature(features, options.image_key, options.source), tfds.features.Image):
                decoders = tfds.decode.SkipDecoding()
                for part in reversed(options.image_key.split("/")):
                    decoders = {part: decoders}
            self._records = builder.as_data_source(split, decoders=decoders)
            sizes = {name: (part.num_bytes, part.shard_lengths) for name, part in builder.info.splits.items()}
            self.identity = f"{builder.data_path} {split} {sizes}"
        except DataError:
            raise
        except (
            tfds.core.DatasetNotFoundError,
            NotImplementedError,
            OSError,
            ImportError,
            AssertionError,
            TypeError,
            ValueError,
        ) as error:
            raise DataError(
                f"The TFDS data set {options.source!r} (split {split!r}, in {data_dir}) cannot be opened: "
                f"{error}. "
                "Give a TFDS name with a picture and a caption feature, or 'folder' with data.path."
            ) from error
        self._image_key, self._caption_key = options.image_key.split("/"), options.caption_key.split("/")

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> Record:
        name = f"{self.description} #{index}"
        try:
            example = self._records[index]
        except Exception as error:  # the reader and the parser raise their own kinds on damaged records
            raise UnreadableExample("unreadable record", name, f"{type(error).__name__}: {error}") from error
        image = _lookup(example, self._image_key)
        captions = _lookup(example, self._caption_key)
        if isinstance(captions, (str, bytes)):
            captions = (captions,)
        taken = {self._image_key[0], self._caption_key[0]}
        extra = {key: _as_text(value) for key, value in example.items() if key not in taken}
        return Record(image, tuple(captions), name, extra)


def _feature(features, key: str, source: str):
    """The TFDS feature under "a/b"; a clear error names what there is."""
    found = features
    for part in key.split("/"):
        found = getattr(found, "feature", found)  # a Sequence of dicts reads as the dict
        try:
            found = found[part]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{source} has no feature {key!r}; it has {', '.join(sorted(features))}. "
                "Set data.image_key and data.caption_key to the picture and the caption."
            ) from error
    return found


def _lookup(example, path: list[str]):
    for part in path:
        example = example[part]
    return example


def _as_text(value):
    """Bytes as str where they are UTF-8; everything else as it is."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value
