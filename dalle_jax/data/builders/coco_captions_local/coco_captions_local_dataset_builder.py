"""MS-COCO's images and captions, from a local copy in the layout of its unpacked archives.

    DIR/annotations/captions_train2014.json    DIR/train2014/COCO_train2014_000000000009.jpg …
    DIR/annotations/captions_val2014.json      DIR/val2014/COCO_val2014_000000000042.jpg …

train       train2014
validation  val2014, of which DALL-E is evaluated on 30,000 captions

Images and their captions (about five each) come in the order of their ids. Training draws one caption each time,
evaluation uses the first. Features have the names of TFDS's `coco_captions`.

TFDS's own data set reads the archives themselves, with TensorFlow: `tfds build coco_captions --manual_dir=DIR
--file_format=array_record --data_dir=…`. It needs no network if DIR holds all eight archives that it requests. These
include the test sets, which have no captions. Once prepared, it is read instead of this one (data/sources/tfds.py).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dalle_jax.data.builders.local_copy import Examples, LocalCopyBuilder, ReadOnce, in_parts, read_text
from dalle_jax.data.builders.made_from import count_files, fingerprint
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.storage import json_files

_YEARS = (2014, 2017)
_FOLDERS = {"train": "train", "validation": "val"}
_IMAGES_PER_SHARD = 2048  # about 300 MB


@dataclasses.dataclass(eq=False, kw_only=True)
class CocoConfig(tfds.core.BuilderConfig):
    """The choice of COCO's division. The name distinguishes divisions on disk.

    Attributes:
      year: 2014 (the paper's) or 2017 (the same images, only 5,000 of them for validation).
      made_from: fingerprint of the local copy, see `made_from`; "" if it is not known.
    """

    name: str = dataclasses.field(init=False)
    year: int = 2014
    made_from: str = ""

    def __post_init__(self):
        if self.year not in _YEARS:
            raise ConfigError(f"coco_captions: year is {self.year!r}; expected 2014 or 2017.")
        self.name = str(self.year) + (f"_{self.made_from}" if self.made_from else "")


class Builder(LocalCopyBuilder):
    """TFDS builder `coco_captions_local`; keyword arguments are those of `CocoConfig`.

    Features: `image` (JPEG), `image/filename`, `image/id`, `captions` (several `text` with their `id`).
    """

    VERSION = tfds.core.Version("1.0.0")
    CONFIG = CocoConfig
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    From cocodataset.org: "2014 Train images", "2014 Val images" and "2014 Train/Val annotations", unpacked there into
    train2014/, val2014/ and annotations/.
    """

    def features(self) -> tfds.features.FeaturesDict:
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "image/filename": tfds.features.Text(),
                "image/id": np.int64,
                "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
            }
        )

    def shards(self, dl_manager):
        root, year = self.local_copy(dl_manager), self.builder_config.year
        _check_layout(root, year)
        shards = {}
        for split, folder in _FOLDERS.items():
            images = read_annotations(root / f"annotations/captions_{folder}{year}.json")
            shards[split] = [
                functools.partial(self._examples, split, root / f"{folder}{year}", part)
                for part in in_parts(images, _IMAGES_PER_SHARD)
            ]
        return shards

    def _examples(self, split: str, folder: epath.Path, images: Sequence[dict[str, Any]]) -> Examples:
        for image in images:
            name = image["image/filename"]
            try:
                content = (folder / name).read_bytes()
            except OSError as error:
                self.leave_out(split, "missing file", f"{folder.name}/{name} ({error})")
                continue
            yield name, {"image": ReadOnce(content), **image}


def made_from(root: epath.Path, year: int = 2014) -> str:
    """Returns the fingerprint of a local copy: its tables, and how many images it holds.

    Args:
      root: the local copy.
      year: as in `CocoConfig`.
    """
    tables = [root / f"annotations/captions_{folder}{year}.json" for folder in _FOLDERS.values()]
    images = [count_files(root / f"{folder}{year}") for folder in _FOLDERS.values()]
    return fingerprint(root, [table for table in tables if table.exists()], images)


def read_annotations(file: epath.Path) -> list[dict[str, Any]]:
    """Reads one of COCO's caption files.

    Args:
      file: `captions_<split><year>.json`.

    Returns:
      For each image {"image/filename", "image/id", "captions": list of {"text", "id"}}, in the order of the ids.

    Raises:
      DataError: if it is not such a file.
    """
    captions = collections.defaultdict(list)
    try:
        content = json_files.parse(read_text(file))
        for annotation in sorted(content["annotations"], key=lambda each: each["id"]):
            captions[annotation["image_id"]].append({"text": annotation["caption"], "id": annotation["id"]})
        return [
            {"image/filename": image["file_name"], "image/id": image["id"], "captions": captions[image["id"]]}
            for image in sorted(content["images"], key=lambda each: each["id"])
        ]
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{file} is not one of COCO's caption files ({type(error).__name__}: {error}): expected JSON with 'images' "
            "(id, file_name) and 'annotations' (id, image_id, caption). Unpack the archive of annotations again."
        ) from error


def _check_layout(root: epath.Path, year: int) -> None:
    """Raises an error that names all missing files and folders, before an hour of writing."""
    expected = [f"annotations/captions_{folder}{year}.json" for folder in _FOLDERS.values()]
    expected += [f"{folder}{year}" for folder in _FOLDERS.values()]
    missing = [path for path in expected if not (root / path).exists()]
    if not missing:
        return
    others = [
        other for other in _YEARS if (root / f"annotations/captions_train{other}.json").exists() and other != year
    ]
    raise DataError(
        f"{root} is not a copy of COCO {year} as its archives unpack: {', '.join(missing)} not found there. Unpack "
        f"train{year}.zip, val{year}.zip and annotations_trainval{year}.zip (cocodataset.org) into that folder"
        + "".join(f", or set data.builder_kwargs.year={other}, which is there" for other in others)
        + "."
    )
