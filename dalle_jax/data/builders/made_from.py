"""Fingerprints of a user's files, by which a prepared copy is found again and a changed original is noticed."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable

from etils import epath

from dalle_jax.storage.files import is_remote

_BLOCK = 1 << 14  # bytes read at the start, in the middle and at the end of a file


def fingerprint(root: epath.Path, files: Iterable[epath.Path], more: Iterable[object] = ()) -> str:
    """Returns a short hash over the files' names, sizes, times and parts of their content.

    A file that is replaced, edited in place or grown gives another hash, as do other files or another `root`. Remote
    files are not read.

    Args:
      root: the folder that the names are relative to.
      files: the files, in order.
      more: further values that the copy depends on.

    Raises:
      OSError: if a file cannot be read.
    """
    found = hashlib.sha256(str(root).encode("utf-8", "surrogateescape"))
    for file in files:
        if is_remote(file):
            facts = file.stat()
            row = f"\n{file.relative_to(root)} {facts.length} {facts.mtime}"
        else:
            facts = os.stat(file)
            parts = _parts(str(file), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)
            row = f"\n{file.relative_to(root)} {facts.st_size} {facts.st_mtime_ns} {parts}"
        found.update(row.encode("utf-8", "surrogateescape"))
    found.update(repr(tuple(more)).encode())
    return found.hexdigest()[:12]


_FILES = (".jpg", ".txt")  # of these data sets; spares a look at each file


@functools.lru_cache(maxsize=100_000)  # a source is opened several times in a run
def _parts(path: str, length: int, *times: int) -> str:
    """Returns a hash of three blocks. The times, of the last change too, only distinguish entries of the cache."""
    with open(path, "rb") as file:
        found = hashlib.sha256()
        for start in (0, max(0, length // 2 - _BLOCK // 2), max(0, length - _BLOCK)):
            file.seek(start)
            found.update(file.read(_BLOCK))
    return found.hexdigest()


def count_files(folder: epath.Path) -> int:
    """Returns the number of files in a folder and in the folders in it; 0 if it does not exist."""
    if not folder.is_dir():
        return 0
    entries = list(folder.iterdir())
    folders = [entry for entry in entries if entry.suffix.lower() not in _FILES and entry.is_dir()]
    return len(entries) + sum(len(list(inner.iterdir())) for inner in folders)
