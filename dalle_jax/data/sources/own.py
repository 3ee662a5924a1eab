"""Tells what a user's data is: a folder of images, or tar shards.

`data.source` is "auto" where the files of `data.path` decide. The names alone are read, not the files.
"""

from __future__ import annotations

import itertools
import mimetypes
from collections.abc import Iterator

from etils import epath

from dalle_jax.errors import ConfigError
from dalle_jax.storage.files import expanded
from dalle_jax.storage.reachable import check_reachable

AUTO, FOLDER, TAR_SHARDS = "auto", "folder", "tar_shards"
_TAR = (".tar", ".tar.gz", ".tgz")
_LISTED = 20_000  # entries that are looked at
_DEPTH = 5  # folders inside of each other; ends loops of links


def kind_of(path: str) -> str | None:
    """Returns the source that reads a path: "folder", "tar_shards", or None if it holds neither images nor shards.

    A single image makes it a folder, because a folder of images may also hold archives.

    Args:
      path: a folder, or a shard, or a glob of shards; local or remote.
    """
    check_reachable(path)
    place, tars = expanded(path), False
    if str(path).endswith(_TAR):
        return TAR_SHARDS
    for name in itertools.islice(_names(place), _LISTED):
        if (mimetypes.guess_type(name)[0] or "").startswith("image/"):
            return FOLDER
        tars = tars or name.lower().endswith(_TAR)
    return TAR_SHARDS if tars else None


def _names(place: epath.Path) -> Iterator[str]:
    """Yields the names of all files below a folder, outer folders first."""
    level = [place] if place.is_dir() else []
    for _ in range(_DEPTH):
        folders = []
        for entry in itertools.chain.from_iterable(folder.iterdir() for folder in level):
            yield entry.name
            if "." not in entry.name:
                folders.append(entry)
        level = [folder for folder in folders if folder.is_dir()]


def choose_source(source: str, path: str | None, where: str = "data") -> str:
    """Returns the source to read: `source`, or the one that the files decide if it is "auto".

    Args:
      source: `data.source`.
      path: `data.path`.
      where: the section that holds both, for messages.

    Raises:
      ConfigError: no path, or the files are of the other kind.
    """
    if source not in (AUTO, FOLDER, TAR_SHARDS):
        return source
    if not path:
        held = {FOLDER: "images", TAR_SHARDS: "shards"}.get(source, "images or tar shards")
        raise ConfigError(f"config.{where}.path is not set: give --config.{where}.path=DIR, the folder of your {held}.")
    found = kind_of(path)
    if source == AUTO:
        return found or FOLDER  # its error says what is missing
    if found is not None and found != source:
        held = "images and no tar shards" if found == FOLDER else "tar shards and no images"
        raise ConfigError(
            f"config.{where}.source is {source!r}, but {path} holds {held}: give --config.{where}.source={found}."
        )
    return source
