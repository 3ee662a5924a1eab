"""TFDS data sets as sources: the project's builders, MS-COCO's captions, and every other data set that TFDS can read.

`coco_captions` is the first of these that exists:

1. TFDS's own data set, if `data_dir` holds it, prepared as ArrayRecord. Its splits are those of Karpathy and Li (train,
   val, test, restval). "validation" means the last three together, which are val2014.
2. `coco_captions_local` (see its docstring), prepared from a local copy of the official files. Its splits are COCO's,
   train and validation, with the same images and captions.
"""

from __future__ import annotations

import tensorflow_datasets as tfds

from dalle_jax.data.sources.preparing import COCO, prepare
from dalle_jax.data.sources.record import Record, UnreadableExample
from dalle_jax.data.sources.source import DataOptions, Source, sum_left_out
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import DataError, UserError
from dalle_jax.storage.reachable import check_reachable

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
        data_dir = options.prepared_dir
        check_reachable(data_dir)
        self.description = f"{options.source} ({split})"
        try:
            with first_host_first(f"the data set {options.source}"):
                builder = prepare(options, data_dir)
            if builder.name == COCO and split == "validation":
                split = _COCO_VALIDATION
            splits = [part.split("[")[0].strip() for part in split.split("+")]
            if missing := [part for part in splits if part not in builder.info.splits]:
                raise DataError(
                    f"{options.source} has no split {missing[0]!r}; it has {', '.join(sorted(builder.info.splits))}."
                )
            for part in split.split("+"):
                if builder.info.splits[part.strip()].num_examples < 0:
                    raise DataError(f"{options.source}: the split {part.strip()!r} ends before it begins.")
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
            feature = _feature(features, options.caption_key, options.source)
            self._classes = feature.names if isinstance(feature, tfds.features.ClassLabel) else None
            self.identity = f"{builder.data_path} {split} {sizes}"
            self.image_identity = f"{builder.info.full_name} {split} {sizes}"
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
        self.left_out = sum_left_out((builder.info.metadata or {}).get("left_out", {}), splits)

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
        if self._classes is not None:
            captions = self._classes[int(captions)]
        if isinstance(captions, (str, bytes)):
            captions = (captions,)
        taken = {self._image_key[0], self._caption_key[0]}
        extra = {key: _as_text(value) for key, value in example.items() if key not in taken}
        if called := next((extra[key] for key in _NAME_KEYS if isinstance(extra.get(key), str)), ""):
            name = f"{name} ({called})"
        return Record(image, tuple(captions), name, extra)


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
