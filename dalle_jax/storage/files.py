"""Workdirs on a disk or on object storage ("gs://bucket/run"): paths, atomic writes, error messages.

All files of a run are written with `etils.epath`, its checkpoints with orbax and tensorstore. Object storage writes an
object completely or not at all, and cannot append to it. Files that grow (metrics.jsonl, TensorBoard's events) are
therefore written to a local `Mirror`, which uploads whole files.

`gs://` needs gcsfs (`pip install 'dalle_jax[gcs]'`) and Google's usual credentials.
"""

from __future__ import annotations

import glob
import json
import os
import unicodedata
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import fsspec
from etils import epath

from dalle_jax.errors import ConfigError, UserError
from dalle_jax.storage.errors import storage_errors_as

_NOT_IN_A_LINE = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are not UTF-8, ends of lines
_PATTERNS = "*?[]#"
_LONGEST_PATH = 3000  # bytes; systems allow 4,096, and checkpoints have long names


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether `path` is on object storage."""
    return "://" in str(path)


def expanded(path: epath.PathLike) -> epath.Path:
    """Returns `path` as an `epath.Path` with `~` expanded and without "file://".

    Every path that a user gives passes through here before its file system is opened, see `disable_listings_cache`.
    """
    text = os.fspath(path)
    if text.startswith("file://"):
        path = urllib.parse.unquote(text.removeprefix("file://").removeprefix("localhost"))
    try:
        path = epath.Path(path).expanduser()
    except KeyError as scheme:
        raise ConfigError(
            f"{text!r} cannot be opened: paths that begin with {scheme} are unknown. Give a directory, or gs://BUCKET/DIR."
        ) from None
    if is_remote(path):
        disable_listings_cache()
    return path


def disable_listings_cache() -> None:
    """Makes gcsfs list a bucket again on each request, because tensorstore and other processes write there too.

    Affects file systems that are opened later. `main` calls it, and `expanded` for programs that import the package.
    A value that the user has set in fsspec's configuration stays.
    """
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def full_path(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path, with `~` expanded. (`absolute` of etils treats "gs://…" as a relative path.)"""
    path = expanded(path)
    return path if is_remote(path) else path.absolute()


class LiteralPath(type(epath.Path("/"))):
    """A local path whose `glob` takes the path itself as it is, because a workdir may be named "a[b]"."""

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yields what matches the pattern below this path."""
        for found in glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)):
            yield type(self)(found)


def check_name(workdir: epath.PathLike) -> None:
    """Raises a `ConfigError` for a name of a workdir whose files could not be read again.

    Tensorstore reads a backslash as a slash, and needs UTF-8. Messages and logs need names of one line.
    """
    name = os.fspath(workdir)
    if wrong := [each for each in name if each == "\\" or unicodedata.category(each) in _NOT_IN_A_LINE]:
        found = f"{wrong[0]!r}"
    elif is_remote(name) and not name.startswith("file://") and (wrong := [each for each in name if each in _PATTERNS]):
        found = f"{wrong[0]!r}, which object storage takes for a pattern"
    elif len(os.fsencode(full_path(name))) > _LONGEST_PATH:
        found = f"{len(name):,} characters, and its whole path more than {_LONGEST_PATH:,} bytes"
    else:
        return
    shown = repr(name) if len(name) <= 100 else f"{name[:100]!r}…"
    raise ConfigError(f"The workdir {shown} cannot be used: its name has {found}. Give another --workdir=DIR.")


def make_workdir(workdir: epath.PathLike) -> str:
    """Creates a workdir if it does not exist, and returns its name with `~` expanded.

    Raises:
      ConfigError: it cannot be created, its name cannot be used, or its bucket does not exist or is not accessible.
    """
    check_name(workdir)
    path = expanded(workdir)
    with access(workdir):
        if is_remote(path):
            scheme, _, bucket = str(path).split("/")[:3]
            if not epath.Path(f"{scheme}//{bucket}").exists():
                raise FileNotFoundError(2, f"there is no bucket {bucket!r}, or no access to it")
        path.mkdir(parents=True, exist_ok=True)
    return str(path)


@contextmanager
def access(workdir: epath.PathLike) -> Iterator[None]:
    """Turns storage errors of the first use of a workdir into a `ConfigError`."""
    with storage_errors_as(ConfigError, f"Cannot use {str(workdir)!r} as the workdir", "Give another --workdir."):
        try:
            yield
        except ImportError as error:
            if not is_remote(workdir):
                raise
            raise ConfigError(
                f"Cannot use {str(workdir)!r} as the workdir: {error}. Install the missing package: "
                "pip install 'dalle_jax[gcs]'."
            ) from error


def write_atomically(path: epath.PathLike, content: bytes) -> None:
    """Writes a file so that it is never seen half written. Creates its folder if needed.

    Args:
      path: local or remote file.
      content: all its bytes.
    """
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(content)  # an object appears only when it is complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def write_json(path: epath.PathLike, values: Any) -> None:
    """Writes a JSON document atomically.

    Raises:
      UserError: the file cannot be written.
    """
    with write_errors(path):
        write_atomically(path, f"{json.dumps(values, indent=2, ensure_ascii=False)}\n".encode())


@contextmanager
def write_errors(path: epath.PathLike) -> Iterator[None]:
    """Turns storage errors inside the block into a `UserError` that names `path`."""
    remedy = (
        "Free space or give another --workdir, then run the same command again: it resumes from the last checkpoint."
    )
    with storage_errors_as(UserError, f"Cannot write {path}", remedy):
        yield
