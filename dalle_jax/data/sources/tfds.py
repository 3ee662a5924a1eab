"""TFDS data sets as sources: the project's own builders, MS-COCO's captions, and whatever else TFDS can read.

`coco_captions` is found in one of two places, the first that is there:

1. TFDS's own data set, where `data_dir` holds it already, prepared as ArrayRecord. Its splits are those of Karpathy and
   Li (train, val, test, restval); "validation" here means the last three together, which are val2014.
2. `coco_captions_local` (its docstring has the details), made from the user's copy of the official files. Its splits
   are COCO's own, train and validation, with the same pictures and captions.
"""

from __future__ import annotations

import collections
import importlib
import os

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from dalle_jax.data.sources.source import DataOptions, LeftOut, Record, Source, UnreadableExample
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import DataError, UserError

BUILDERS = ("shapes_captions", "emoji_captions", "coco_captions_local", "cub_captions", "tar_shards")
_COCO, _COCO_LOCAL = "coco_captions", "coco_captions_local"
_COCO_CONFIG = "2014"  # the only one that TFDS's coco_captions has
_COCO_VALIDATION = "val+test+restval"
_NAME_KEYS = ("file", "image/filename", "name")  # features that tell a person which example it is


class TfdsSource(Source):
    """A TFDS data set with a picture and a caption feature, stored as ArrayRecord (no TensorFlow)."""

    def __init__(self, options: DataOptions, split: str):
        """Opens the data set, making it first where need be.

        Args:
          options: what to read.
          split: in TFDS's notation ("train", "train[:90%]", "val+test", …).

        Raises:
          DataError: where it cannot be made or opened, or lacks the split or the features.
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
            # Pictures stay encoded here, so that damaged ones can be counted instead of ending the run.
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
            raise DataError(
                f"The TFDS data set {options.source!r} (split {split!r}, in {data_dir}) cannot be opened: "
                f"{error}. "
                "Give a TFDS name with a picture and a caption feature, or 'folder' with data.path."
            ) from error
        self._image_key, self._caption_key = options.image_key.split("/"), options.caption_key.split("/")
        self.left_out = _left_out(builder.info.metadata, splits)

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
        if called := next((extra[key] for key in _NAME_KEYS if isinstance(extra.get(key), str)), ""):
            name = f"{name} ({called})"
        return Record(image, tuple(captions), name, extra)


def _prepare(options: DataOptions, data_dir: str) -> tfds.core.DatasetBuilder:
    """The builder of the data set that the options name, its files written."""
    source, arguments = options.source, dict(options.builder_kwargs)
    if source == _COCO:
        if (prepared := _prepared_coco(data_dir)) is not None:
            if options.path:
                logging.info("data.path is not read: TFDS's coco_captions is prepared in %s", prepared.data_path)
            return prepared
        source = _COCO_LOCAL
    if source in BUILDERS:
        importlib.import_module(f"dalle_jax.data.builders.{source}")
    if source == "tar_shards":
        arguments["path"] = options.path
    builder = tfds.builder(source, data_dir=data_dir, file_format="array_record", **arguments)
    # TFDS would ask its public bucket first, over the network, though that has nothing in this format.
    download = tfds.download.DownloadConfig(manual_dir=options.path, try_download_gcs=False)
    builder.download_and_prepare(download_config=download)
    return builder


def _prepared_coco(data_dir: str) -> tfds.core.DatasetBuilder | None:
    """TFDS's own coco_captions, where it is there in a format with random access; read without its code."""
    folder = epath.Path(data_dir) / _COCO / _COCO_CONFIG
    versions = folder.glob("*/dataset_info.json") if folder.exists() else []
    found = [tfds.builder_from_directory(version.parent) for version in sorted(versions)]
    readable = [builder for builder in found if builder.info.file_format.value == "array_record"]
    for builder in found:
        if builder not in readable:
            logging.warning(
                "coco_captions in %s is not read: it is %s; expected array_record (TFDS writes it with "
                "--file_format=array_record).", builder.data_path, builder.info.file_format.value,
            )  # fmt: skip
    return readable[-1] if readable else None


def _left_out(metadata, splits: list[str]) -> tuple[LeftOut, ...]:
    """What the project's builders wrote down (own_copy.py), of these splits together."""
    counts, names = collections.Counter(), collections.defaultdict(list)
    for split in splits:
        for reason, found in (metadata or {}).get("left_out", {}).get(split, {}).items():
            counts[reason] += found["count"]
            names[reason] += found["names"]
    return tuple(LeftOut(reason, counts[reason], tuple(names[reason])) for reason in sorted(counts))


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
