"""TFDS data sets as sources: the project's builders, MS-COCO's captions, and every other data set that TFDS can read.

`coco_captions` is the first of these that exists:

1. TFDS's own data set, if `data_dir` holds it, prepared as ArrayRecord. Its splits are those of Karpathy and Li (train,
   val, test, restval). "validation" means the last three together, which are val2014.
2. `coco_captions_local` (see its docstring), prepared from a local copy of the official files. Its splits are COCO's,
   train and validation, with the same images and captions.
"""

from __future__ import annotations

import collections
import os

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from dalle_jax.data.builders import (  # noqa: F401 - importing them registers them with TFDS
    coco_captions_local,
    cub_captions,
    emoji_captions,
    shapes_captions,
    tar_shards,
)
from dalle_jax.data.sources.source import DataOptions, LeftOut, Record, Source, UnreadableExample
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import DataError, UserError

_COCO, _COCO_LOCAL = "coco_captions", "coco_captions_local"
_COCO_CONFIG = "2014"  # the only one that TFDS's coco_captions has
_COCO_VALIDATION = "val+test+restval"
_NAME_KEYS = ("file", "image/filename", "name")  # features that name an example for people


class TfdsSource(Source):
    """A TFDS data set with an image and a caption feature, stored as ArrayRecord (no TensorFlow)."""

    def __init__(self, options: DataOptions, split: str):
        """Opens the data set, and first prepares it if needed.

        Args:
          options: what to read.
          split: the split in TFDS's notation ("train", "train[:90%]", "val+test", …).

        Raises:
          DataError: if it cannot be prepared or opened, or lacks the split or the features.
        """
        data_dir = options.data_dir or os.environ.get("DALLE_JAX_DATA") or "~/.cache/dalle_jax/data"
        data_dir = data_dir if "://" in data_dir else os.path.expanduser(data_dir)
        self.description = f"{options.source} ({split})"
        try:
            with first_host_first(f"the data set {options.source}"):
                builder = _prepare(options, data_dir)
            if builder.name == _COCO and split == "validation":
                split = _COCO_VALIDATION
            splits = [part.split("[")[0].strip() for part in split.split("+")]
            if missing := [part for part in splits if part not in builder.info.splits]:
                raise DataError(
                    f"{options.source} has no split {missing[0]!r}; it has {', '.join(sorted(builder.info.splits))}."
                )
            features = builder.info.features
            for key in (options.image_key, options.caption_key):
                _feature(features, key, options.source)
            # Images stay encoded here, so that the pipeline can count damaged ones instead of ending the run.
            decoders = None
            if isinstance(_feature(features, options.image_key, options.source), tfds.features.Image):
                decoders = tfds.decode.SkipDecoding()
                for part in reversed(options.image_key.split("/")):
                    decoders = {part: decoders}
            self._records = builder.as_data_source(split, decoders=decoders)
            sizes = {name: (part.num_bytes, part.shard_lengths) for name, part in builder.info.splits.items()}
            self.identity = f"{builder.data_path} {split} {sizes}"
        except UserError:
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
            found = str(error).partition("\nAvailable datasets")[0].rstrip(".")  # there are hundreds of them
            raise DataError(
                f"The TFDS data set {options.source!r} (split {split!r}, in {data_dir}) cannot be opened: "
                f"{found}. "
                "Give a TFDS name with an image and a caption feature, or 'folder' with data.path."
            ) from error
        self._image_key, self._caption_key = options.image_key.split("/"), options.caption_key.split("/")
        self.left_out = _left_out(builder.info.metadata, splits)

    def __len__(self) -> int:
        return len(self._records)

    def record(self, index: int) -> Record:
        name = f"{self.description} #{index}"
        try:
            example = self._records[index]
        except Exception as error:  # reader and parser raise various errors on damaged records
            raise UnreadableExample("unreadable record", name, f"{type(error).__name__}: {error}") from error
        image = _lookup(example, self._image_key)
        captions = _lookup(example, self._caption_key)
        if isinstance(captions, (str, bytes)):
            captions = (captions,)
        taken = {self._image_key[0], self._caption_key[0]}
        extra = {key: _as_text(value) for key, value in example.items() if key not in taken}
        if called := next((extra[key] for key in _NAME_KEYS if isinstance(extra.get(key), str)), ""):
            name = f"{name} ({called})"
        return Record(image, tuple(captions), name, extra)


def _prepare(options: DataOptions, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of the data set that the options name, after preparing its files."""
    source, arguments = options.source, dict(options.builder_kwargs)
    if source == _COCO:
        if (prepared := _prepared_coco(data_dir)) is not None:
            if options.path:
                logging.info("data.path is ignored: TFDS's coco_captions is prepared in %s", prepared.data_path)
            return prepared
        source = _COCO_LOCAL
    if source == "tar_shards":
        arguments["path"] = options.path
    builder = tfds.builder(source, data_dir=data_dir, file_format="array_record", **arguments)
    # TFDS would first look in its public bucket, over the network, which holds no data in this format.
    download = tfds.download.DownloadConfig(manual_dir=options.path, try_download_gcs=False)
    builder.download_and_prepare(download_config=download)
    return builder


def _prepared_coco(data_dir: str) -> tfds.core.DatasetBuilder | None:
    """Returns TFDS's own coco_captions from its files, if they exist in a format with random access."""
    folder = epath.Path(data_dir) / _COCO / _COCO_CONFIG
    versions = folder.glob("*/dataset_info.json") if folder.exists() else []
    found = [tfds.builder_from_directory(version.parent) for version in sorted(versions)]
    readable = [builder for builder in found if builder.info.file_format.value == "array_record"]
    for builder in found:
        if builder not in readable:
            logging.warning(
                "coco_captions in %s is ignored: its format is %s; expected array_record (run tfds build with "
                "--file_format=array_record).", builder.data_path, builder.info.file_format.value,
            )  # fmt: skip
    return readable[-1] if readable else None


def _left_out(metadata, splits: list[str]) -> tuple[LeftOut, ...]:
    """Sums up the examples that a builder left out (builders/local_copy.py) over these splits."""
    counts, names = collections.Counter(), collections.defaultdict(list)
    for split in splits:
        for reason, found in (metadata or {}).get("left_out", {}).get(split, {}).items():
            counts[reason] += found["count"]
            names[reason] += found["names"]
    return tuple(LeftOut(reason, counts[reason], tuple(names[reason])) for reason in sorted(counts))


def _feature(features, key: str, source: str):
    """Returns the TFDS feature "a/b"; the error for an unknown key lists the features."""
    found = features
    for part in key.split("/"):
        found = getattr(found, "feature", found)  # a Sequence of dicts reads as the dict
        try:
            found = found[part]
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{source} has no feature {key!r}; it has {', '.join(sorted(features))}. "
                "Set data.image_key and data.caption_key to the image and the caption."
            ) from error
    return found


def _lookup(example, path: list[str]):
    for part in path:
        example = example[part]
    return example


def _as_text(value):
    """Returns bytes that are UTF-8 as str, and every other value unchanged."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    return value
