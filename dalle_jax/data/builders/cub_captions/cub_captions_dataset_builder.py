"""Caltech-UCSD Birds 200-2011 with ten captions per image, from a local copy.

    DIR/CUB_200_2011/images.txt, classes.txt, image_class_labels.txt, bounding_boxes.txt, train_test_split.txt
    DIR/CUB_200_2011/images/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.jpg …
    DIR/text_c10/001.Black_footed_Albatross/Black_Footed_Albatross_0001_796111.txt …

`CUB_200_2011` is the archive of the data set itself. The captions, one on each of ten lines, come with "Learning Deep
Representations of Fine-grained Visual Descriptions" (Reed et al., arXiv 1605.05395). Their archive unpacks as
`cvpr2016_cub`; `text_c10` is also found there and inside `CUB_200_2011`.

    division     train    test     split by
    official     5,994    5,794    `train_test_split.txt`; both splits hold all 200 species
    classes      8,855    2,933    species: `trainvalclasses.txt` (150) and `testclasses.txt` (50) next to `text_c10`

Reed et al. and most later text-to-image work use the division by classes. Images come in the order of `images.txt`.
Training draws one caption each time, evaluation uses the first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from dalle_jax.data.builders.local_copy import Examples, LocalCopyBuilder, ReadOnce, in_parts, read_text
from dalle_jax.data.builders.made_from import count_files, fingerprint
from dalle_jax.errors import ConfigError, DataError

_TABLES = ("images.txt", "classes.txt", "image_class_labels.txt", "bounding_boxes.txt", "train_test_split.txt")
_CLASS_LISTS = {"train": "trainvalclasses.txt", "test": "testclasses.txt"}
_TABLE_FOLDERS = ("CUB_200_2011", "")
_CAPTIONS = ("text_c10", "cvpr2016_cub/text_c10", "CUB_200_2011/text_c10")
_DIVISIONS = ("official", "classes")
_IMAGES_PER_SHARD = 2048  # about 200 MB


@dataclasses.dataclass(eq=False, kw_only=True)
class CubConfig(tfds.core.BuilderConfig):
    """The division into splits. The name distinguishes divisions on disk.

    Attributes:
      division: "official" (`train_test_split.txt`) or "classes" (species that training never sees).
      made_from: fingerprint of the local copy, see `made_from`; "" if it is not known.
    """

    name: str = dataclasses.field(init=False)
    division: str = "official"
    made_from: str = ""

    def __post_init__(self):
        if self.division not in _DIVISIONS:
            raise ConfigError(f"cub_captions: division is {self.division!r}; expected one of {', '.join(_DIVISIONS)}.")
        self.name = self.division + (f"_{self.made_from}" if self.made_from else "")


@dataclasses.dataclass(frozen=True)
class Bird:
    """One row of the tables.

    Attributes:
      file: path below `images/`; its folder is the species.
      species: name of the class, "001.Black_footed_Albatross".
      box: x, y, width and height of the bird, in pixels.
      split: "train" or "test".
    """

    file: str
    species: str
    box: tuple[float, ...]
    split: str


class Builder(LocalCopyBuilder):
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
        root = self.local_copy(dl_manager)
        tables, texts = _find(root, _TABLE_FOLDERS, _TABLES), _find_captions(root)
        birds = read_birds(tables)
        if self.builder_config.division == "classes":
            birds = _divide_by_class(birds, texts.parent)
        return {
            split: [
                functools.partial(self._examples, split, tables / "images", texts, part)
                for part in in_parts([bird for bird in birds if bird.split == split], _IMAGES_PER_SHARD)
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
                lines = []  # the tokenizer can still use the image; the pipeline counts the missing caption
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


def made_from(root: epath.Path, division: str = "official") -> str:
    """Returns the fingerprint of a local copy: its tables, and how many images and texts it holds.

    Args:
      root: the local copy.
      division: as in `CubConfig`; every division has the same fingerprint.
    """
    del division
    texts = [root / place for place in _CAPTIONS]
    tables = [root / folder / name for folder in _TABLE_FOLDERS for name in _TABLES]
    tables += [folder.parent / name for folder in texts for name in _CLASS_LISTS.values()]
    folders = [*(root / folder / "images" for folder in _TABLE_FOLDERS), *texts]
    return fingerprint(root, dict.fromkeys(each for each in tables if each.exists()), map(count_files, folders))


def read_birds(folder: epath.Path) -> list[Bird]:
    """Reads the data set's tables.

    Args:
      folder: `CUB_200_2011`.

    Returns:
      The rows in the order of `images.txt`, with the official division.

    Raises:
      DataError: if a table is missing or has a malformed row.
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
            f"The tables in {folder} ({', '.join(_TABLES)}) do not match: {type(error).__name__} {error}. "
            "Unpack the archive again."
        ) from error


def _table(file: epath.Path) -> dict[str, str]:
    """Reads a table with rows "number value" and returns the values by number."""
    rows = [line.split(maxsplit=1) for line in read_text(file).splitlines() if line.strip()]
    if bad := [row for row in rows if len(row) != 2]:
        raise DataError(f"{file}: expected rows of a number and a value, found {' '.join(bad[0])!r}.")
    return {number: value.strip() for number, value in rows}


def _divide_by_class(birds: Sequence[Bird], folder: epath.Path) -> list[Bird]:
    """Returns the rows with the split to which the class lists in `folder` assign their species."""
    splits: Mapping[str, str] = {
        species: split for split, name in _CLASS_LISTS.items() for species in read_text(folder / name).split()
    }
    if missing := sorted({bird.species for bird in birds} - set(splits)):
        raise DataError(
            f"{' and '.join(_CLASS_LISTS.values())} in {folder} do not name the species {missing[0]!r} (and "
            f"{len(missing) - 1} more): use the lists that came with the captions, or set division='official'."
        )
    return [dataclasses.replace(bird, split=splits[bird.species]) for bird in birds]


def _find(root: epath.Path, folders: Sequence[str], names: Sequence[str]) -> epath.Path:
    """Returns the first of the folders below `root` that holds any of the names, and checks that it holds all."""
    places = [root / folder if folder else root for folder in folders]
    for place in places:
        found = [name for name in names if (place / name).exists()]
        if found and len(found) < len(names):
            missing = [name for name in names if name not in found]
            raise DataError(f"{place} is incomplete: {', '.join(missing)} not found. Unpack the archive again.")
        if found:
            return place
    raise DataError(
        f"{root} is not a copy of CUB-200-2011: looked for {', '.join(names)} in {' and '.join(map(str, places))}. "
        "Unpack CUB_200_2011.tgz (data.caltech.edu) into that folder."
    )


def _find_captions(root: epath.Path) -> epath.Path:
    places = [root / place for place in _CAPTIONS]
    for place in places:
        if place.is_dir():
            return place
    raise DataError(
        f"No captions for CUB-200-2011: looked for {', '.join(map(str, places))}. Unpack those of Reed et al. (2016; "
        "cvpr2016_cub.tar.gz, github.com/reedscot/cvpr2016) there: a folder for each species, with <image>.txt in it."
    )
