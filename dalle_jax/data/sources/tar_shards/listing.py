"""Finds tar shards: in a folder, in its sub-folders, or by a glob."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping

from absl import logging
from etils import epath

from dalle_jax.errors import DataError
from dalle_jax.storage.files import expanded, is_remote

_ENDINGS = (".tar", ".tar.gz", ".tgz")
_SPLIT = re.compile(r"\w[\w-]*")  # TFDS's names of splits, of which "all" means all of them
_NO_DATA = ("__MACOSX", "@eaDir")


@dataclasses.dataclass(frozen=True)
class Shards:
    """Shards in the order of their names.

    Attributes:
      root: the folder that holds all of them.
      splits: the shards of each split; {"": shards} if they are not divided into splits yet.
      no_splits: names of sub-folders with shards that cannot be splits.
    """

    root: epath.Path
    splits: Mapping[str, list[epath.Path]]
    no_splits: tuple[str, ...] = ()


def find_shards(path: str) -> Shards:
    """Lists shards.

    Args:
      path: a folder, one shard, or a glob. Characters of globs in the name of an existing folder stand for themselves.

    Returns:
      The shards. They count as undivided if the only sub-folder is "train" or cannot be a split ("all", "part 1").

    Raises:
      DataError: if there are no shards.
    """
    place = expanded(path)
    if place.is_dir():
        found = _in_folder(place)
    else:
        found = _by_glob(place, path)
    if not any(found.splits.values()):
        raise DataError(f"{path} holds no shards ({', '.join(_ENDINGS)}), and neither do folders in it.")
    return found


def _in_folder(root: epath.Path) -> Shards:
    entries = sorted(root.iterdir())
    if shards := _shards(entries):
        return Shards(root, {"": shards})
    folders = {
        entry.name: shards
        for entry in entries
        if not entry.name.startswith(".") and entry.name not in _NO_DATA and entry.is_dir()
        if (shards := _shards(entry.iterdir()))
    }
    splits = {name: shards for name, shards in folders.items() if _SPLIT.fullmatch(name) and name != "all"}
    if len(folders) == 1 and (not splits or "train" in splits):
        return Shards(root, {"": next(iter(folders.values()))})
    no_splits = tuple(name for name in folders if name not in splits)
    if no_splits and not splits:
        raise DataError(
            f"{root} holds shards in the folders {', '.join(no_splits)}, whose names cannot be splits: put all shards "
            "into one folder, or give one of these folders as data.path."
        )
    for name in no_splits:
        logging.warning("%s: the folder %r is left out, because no split can have this name.", root, name)
    return Shards(root, splits, no_splits)


def _by_glob(place: epath.Path, path: str) -> Shards:
    """Lists the shards of a glob. Leading parts that exist stand for themselves, also with characters of globs."""
    plain: list[str] = []
    for part in place.parts[:-1]:
        if _is_pattern(part) and not epath.Path(*plain, part).is_dir():
            break
        plain.append(part)
    root, rest = epath.Path(*plain), place.parts[len(plain) :]
    if not root.is_dir() or not (place.exists() or any(map(_is_pattern, rest))):
        raise DataError(f"data.path is {path}, which is not a folder: give the folder with the shards, or a glob.")
    if place.exists():
        found = [place]
    elif is_remote(root):
        found = root.glob("/".join(rest))
    else:  # epath would read the characters of the root as a pattern, too
        found = map(epath.Path, pathlib.Path(root).glob("/".join(rest)))
    return Shards(root, {"": _shards(found)})


def _is_pattern(part: str) -> bool:
    return any(letter in part for letter in "*?[")


def _shards(entries: Iterable[epath.Path]) -> list[epath.Path]:
    return sorted(
        entry for entry in entries if entry.name.lower().endswith(_ENDINGS) and not entry.name.startswith("._")
    )
