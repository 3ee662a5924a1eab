"""A data set with random access from image–caption tar shards, as img2dataset and WebDataset write them.

    DIR/00000.tar, DIR/00001.tar, …     each with 000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg, …

Images are .jpg, .jpeg, .png or .webp files. The caption is the content of the .txt, or "caption" in the .json. Shards
may be compressed (.tar.gz, .tgz).

Splits: if DIR holds the shards, every twentieth sample of each shard, starting with its first, is "validation" and the
rest is "train". If sub-folders hold them (DIR/train/00000.tar), each sub-folder is the split of its name.

The samples are copied once into TFDS's files, shard by shard and in order, which costs disk space. Reading the shards
in place would need an index of their members, and so a pass over every header. Compressed shards have no random access.
Each example would need two or three reads (requests on remote storage) instead of one.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable

import tensorflow_datasets as tfds
from etils import epath

from dalle_jax.data.builders.local_copy import Examples, LocalCopyBuilder, ReadOnce
from dalle_jax.data.builders.tar_shards import reading
from dalle_jax.errors import DataError

_ENDINGS = (".tar", ".tar.gz", ".tgz")
_VALIDATION_SHARE = 20
_PARTS: dict[str, Callable[[int], bool]] = {
    "train": lambda number: number % _VALIDATION_SHARE != 0,
    "validation": lambda number: number % _VALIDATION_SHARE == 0,
}


@dataclasses.dataclass(eq=False, kw_only=True)
class TarShardsConfig(tfds.core.BuilderConfig):
    """The choice of shards. Their names and sizes distinguish data sets on disk.

    Attributes:
      path: their folder, or a glob ("DIR/000[0-4]*.tar"), local or remote.
      splits: the shards found for each split.
    """

    name: str = dataclasses.field(init=False)
    path: str
    splits: dict[str, list[epath.Path]] = dataclasses.field(init=False)

    def __post_init__(self):
        self.splits = find_shards(self.path)
        listing = [
            f"{split}/{shard.name} {shard.stat().length}" for split, found in self.splits.items() for shard in found
        ]
        self.name = f"shards{len(listing)}_{zlib.crc32(chr(10).join(listing).encode()):08x}"


class Builder(LocalCopyBuilder):
    """TFDS builder `tar_shards`; keyword arguments are those of `TarShardsConfig`.

    Features: `image` (in its original encoding), `caption` (zero or more), `file` (shard and key).
    """

    VERSION = tfds.core.Version("1.0.0")
    CONFIG = TarShardsConfig

    def features(self) -> tfds.features.FeaturesDict:
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "caption": tfds.features.Sequence(tfds.features.Text()),
                "file": tfds.features.Text(),
            }
        )

    def shards(self, dl_manager):
        splits = self.builder_config.splits
        parts = {split: _everything for split in splits} if "" not in splits else _PARTS
        return {
            split: [
                functools.partial(self._examples, split, shard, wanted) for shard in splits.get(split, splits.get(""))
            ]
            for split, wanted in parts.items()
        }

    def _examples(self, split: str, shard: epath.Path, wanted: Callable[[int], bool]) -> Examples:
        try:
            with shard.open("rb") as file:
                for sample in reading.read_samples(file, wanted):
                    name = f"{shard.name}/{sample.key}".encode("utf-8", "backslashreplace").decode()
                    if sample.image is None:
                        self.leave_out(split, "missing image", name)
                        continue
                    yield name, {"image": ReadOnce(sample.image), "caption": list(sample.captions), "file": name}
        except (reading.DamagedShard, OSError) as error:
            self.leave_out(split, "damaged shard", f"{shard.name} ({error})")


def _everything(number: int) -> bool:
    return True


def find_shards(path: str) -> dict[str, list[epath.Path]]:
    """Lists shards in the order of their names.

    Args:
      path: a folder, or a glob.

    Returns:
      The shards of each split; {"": shards} if they are not divided into splits yet.

    Raises:
      DataError: if there are no shards.
    """
    plain = []
    for part in epath.Path(path).expanduser().parts:
        if any(letter in part for letter in "*?["):
            break
        plain.append(part)
    root = epath.Path(*plain)
    pattern = "/".join(epath.Path(path).expanduser().parts[len(plain) :])
    if pattern:
        found = {"": _shards(root.glob(pattern))} if root.is_dir() else {}
    elif root.is_dir():
        entries = list(root.iterdir())
        found = {"": _shards(entries)}
        if not found[""]:
            found = {each.name: _shards(each.iterdir()) for each in sorted(entries) if each.is_dir()}
    else:
        raise DataError(f"data.path is {path}, which is not a folder: give the folder with the shards, or a glob.")
    found = {split: shards for split, shards in found.items() if shards}
    if not found:
        raise DataError(f"{path} holds no shards ({', '.join(_ENDINGS)}), and neither do folders in it.")
    return found


def _shards(entries) -> list[epath.Path]:
    return sorted(entry for entry in entries if entry.name.lower().endswith(_ENDINGS))
