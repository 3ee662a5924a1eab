"""Caltech-UCSD Birds 200-2011 with ten captions for each picture, from the user's own copy.

    DIR/CUB_200_2011/images.txt, classes.txt, image_class_labels.txt, bounding_boxes.txt, train_test_split.txt
    DIR/CUB_200_2011/images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg …
    DIR/text_c10/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.txt …

The first is the archive of the data set itself; the second, with a caption on each of ten lines, comes with "Learning
Deep Representations of Fine-grained Visual Descriptions" (Reed et al., arXiv 1605.05395), whose archive unpacks as
`cvpr2016_cub`: there, or inside `CUB_200_2011`, it is found too.

train, test   by `train_test_split.txt`: 5,994 and 5,794 pictures of the same 200 species; or, with division="classes",
              by species, as in Reed et al. and most text-to-image work since: `trainvalclasses.txt` (150) and
              `testclasses.txt` (50) beside `text_c10`, 8,855 and 2,933 pictures

Pictures come in the order of `images.txt`; training draws one of the captions each time, evaluation takes the first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dalle_jax.data.builders.own_copy import Examples, OwnCopyBuilder, ReadOnce, in_parts, read_text
from dalle_jax.errors import ConfigError, DataError

_TABLES = ("images.txt", "classes.txt", "image_class_labels.txt", "bounding_boxes.txt", "train_test_split.txt")
_CLASS_LISTS = {"train": "trainvalclasses.txt", "test": "testclasses.txt"}
_DIVISIONS = ("official", "classes")
_PICTURES_PER_SHARD = 2048  # about 200 MB


@dataclasses.dataclass(eq=False, kw_only=True)
class CubConfig(tfds.core.BuilderConfig):
    """How the pictures are divided; the name tells the divisions apart on disk.

    Attributes:
      division: "official" (`train_test_split.txt`) or "classes" (species that training never sees).
    """

    name: str = dataclasses.field(init=False)
    division: str = "official"

    def __post_init__(self):
        if self.division not in _DIVISIONS:
            raise ConfigError(f"cub_captions: division is {self.division!r}; expected one of {', '.join(_DIVISIONS)}.")
        self.name = self.division


@dataclasses.dataclass(frozen=True)
class Bird:
    """One row of the tables.

    Attributes:
      file: below `images/`; its folder is the species.
      species: the class's name, "001.Black_footed_Albatross".
      box: x, y, width and height of the bird, in pixels.
      split: "train" or "test".
    """

    file: str
    species: str
    box: tuple[float, ...]
    split: str


class Builder(OwnCopyBuilder):
    """TFDS builder `cub_captions`; keyword arguments are those of `CubConfig`.

    Features: `image` (JPEG), `caption` (several), `file`, `species`, `bounding_box` (float32 [4]: x, y, width and
    height, in pixels).
    """

    VERSION = tfds.core.Version("1.0.0")
    CONFIG = CubConfig
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    CUB_200_2011.tgz (Caltech-UCSD Birds-200-2011, data.caltech.edu), unpacked there into CUB_200_2011/, and the
    captions of Reed et al. (cvpr2016_cub.tar.gz, github.com/reedscot/cvpr2016), unpacked there into
    cvpr2016_cub/text_c10/ or text_c10/.
    """

    def features(self) -> tfds.features.FeaturesDict:
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "caption": tfds.features.Sequence(tfds.features.Text()),
                "file": tfds.features.Text(),
                "species": tfds.features.Text(),
                "bounding_box": tfds.features.Tensor(shape=(4,), dtype=np.float32),
            }
        )

    def shards(self, dl_manager):
        root = self.own_copy(dl_manager)
        tables, texts = _find(root, ("CUB_200_2011", ""), _TABLES), _find_captions(root)
        birds = read_birds(tables)
        if self.builder_config.division == "classes":
            birds = _divide_by_class(birds, texts.parent)
        return {
            split: [
                functools.partial(self._examples, split, tables / "images", texts, part)
                for part in in_parts([bird for bird in birds if bird.split == split], _PICTURES_PER_SHARD)
            ]
            for split in ("train", "test")
        }

    def _examples(self, split: str, images: epath.Path, texts: epath.Path, birds: Sequence[Bird]) -> Examples:
        for bird in birds:
            try:
                content = (images / bird.file).read_bytes()
            except OSError as error:
                self.leave_out(split, "missing file", f"images/{bird.file} ({error})")
                continue
            try:
                lines = (texts / bird.file).with_suffix(".txt").read_bytes().splitlines()
            except OSError:
                lines = []  # the picture is whole: it serves the image tokenizer, and the pipeline counts the rest
            yield (
                bird.file,
                {
                    "image": ReadOnce(content),
                    "caption": [line for line in lines if line.strip()],
                    "file": bird.file,
                    "species": bird.species,
                    "bounding_box": np.array(bird.box, np.float32),
                },
            )


def read_birds(folder: epath.Path) -> list[Bird]:
    """Reads the data set's tables.

    Args:
      folder: `CUB_200_2011`.

    Returns:
      The pictures in the order of `images.txt`, divided as the data set's authors did.

    Raises:
      DataError: where a table is missing, or a row is not what it should be.
    """
    files, classes, labels, boxes, divided = (_table(folder / name) for name in _TABLES)
    try:
        return [
            Bird(
                file=file,
                species=classes[labels[number]],
                box=tuple(float(part) for part in boxes[number].split()),
                split={"1": "train", "0": "test"}[divided[number]],
            )
            for number, file in files.items()
        ]
    except (KeyError, ValueError) as error:
        raise DataError(
            f"The tables in {folder} ({', '.join(_TABLES)}) do not fit each other: {type(error).__name__} {error}. "
            "Unpack the archive again."
        ) from error


def _table(file: epath.Path) -> dict[str, str]:
    """The rows "number value" of one of the tables."""
    rows = [line.split(maxsplit=1) for line in read_text(file).splitlines() if line.strip()]
    if bad := [row for row in rows if len(row) != 2]:
        raise DataError(f"{file}: expected rows of a number and a value, found {' '.join(bad[0])!r}.")
    return {number: value.strip() for number, value in rows}


def _divide_by_class(birds: Sequence[Bird], folder: epath.Path) -> list[Bird]:
    """The pictures with the split that the lists of classes in `folder` put their species in."""
    splits: Mapping[str, str] = {
        species: split for split, name in _CLASS_LISTS.items() for species in read_text(folder / name).split()
    }
    if missing := sorted({bird.species for bird in birds} - set(splits)):
        raise DataError(
            f"{' and '.join(_CLASS_LISTS.values())} in {folder} do not name the species {missing[0]!r} (and "
            f"{len(missing) - 1} more): give the lists that came with the captions, or set division='official'."
        )
    return [dataclasses.replace(bird, split=splits[bird.species]) for bird in birds]


def _find(root: epath.Path, folders: Sequence[str], names: Sequence[str]) -> epath.Path:
    """The first of the folders below `root` that holds any of the names; it must hold them all."""
    places = [root / folder if folder else root for folder in folders]
    for place in places:
        found = [name for name in names if (place / name).exists()]
        if found and len(found) < len(names):
            missing = [name for name in names if name not in found]
            raise DataError(f"{place} is not a whole copy: {', '.join(missing)} not found. Unpack the archive again.")
        if found:
            return place
    raise DataError(
        f"{root} is not a copy of CUB-200-2011: looked for {', '.join(names)} in {' and '.join(map(str, places))}. "
        "Unpack CUB_200_2011.tgz (data.caltech.edu) into that folder."
    )


def _find_captions(root: epath.Path) -> epath.Path:
    places = [root / "text_c10", root / "cvpr2016_cub" / "text_c10", root / "CUB_200_2011" / "text_c10"]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(
        f"No captions for CUB-200-2011: looked for {', '.join(map(str, places))}. Unpack those of Reed et al. (2016; "
        "cvpr2016_cub.tar.gz, github.com/reedscot/cvpr2016) there: a folder for each species, with <picture>.txt in it."
    )
