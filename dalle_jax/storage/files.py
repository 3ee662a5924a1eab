"""Workdirs on a disk or on object storage ("gs://bucket/run"): paths, atomic writes, error messages.

All files of a run are written with `etils.epath`, its checkpoints with orbax and tensorstore. Object storage writes an
object completely or not at all, and cannot append to it. Files that grow (metrics.jsonl, TensorBoard's events) are
therefore written to a local `Mirror`, which uploads whole files.

`gs://` needs gcsfs (`pip install 'dalle_jax[gcs]'`) and Google's usual credentials.
"""

from __future__ import annotations

import json
import os
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from etils import epath

from dalle_jax.errors import ConfigError, UserError
from dalle_jax.storage.errors import storage_errors_as
from dalle_jax.storage.obstacles import make_way_for_file
from dalle_jax.storage.reachable import check_reachable


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


def is_regular_file(path: epath.PathLike) -> bool:
    """Returns whether a path that a user gives is a file. A pipe or a device is none, because reading it may not end.

    Raises:
      ConfigError: its storage cannot be reached.
    """
    check_reachable(path)
    path = expanded(path)
    return path.is_file() if is_remote(path) else os.path.isfile(path)


def full_path(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path, with `~` expanded. (`absolute` of etils treats "gs://…" as a relative path.)"""
    path = expanded(path)
    return path if is_remote(path) else path.absolute()


def make_workdir(workdir: epath.PathLike) -> str:
    """Creates a workdir if it does not exist, and returns its name with `~` expanded.

    Raises:
      ConfigError: it is empty, it cannot be created, or its bucket does not exist or is not accessible.
    """
    if not str(workdir):
        raise ConfigError("No workdir: give --workdir=DIR or config.workdir, the directory for the run's files.")
    path = expanded(workdir)
    with access(workdir):
        if is_remote(path):
            scheme, _, bucket = str(path).split("/")[:3]
            if not epath.Path(f"{scheme}//{bucket}").exists():
                raise FileNotFoundError(2, f"there is no bucket {bucket!r}, or no access to it")
        path.mkdir(parents=True, exist_ok=True)
    return str(path)


def check_writable(workdir: epath.PathLike) -> epath.Path:
    """Creates a workdir if it does not exist, and tests that files can be written there.

    Raises:
      ConfigError: they cannot.
    """
    made = expanded(make_workdir(workdir))
    trial = made / "writable.trial"
    with access(workdir):
        trial.write_text("")
        trial.unlink()
    return made


@contextmanager
def access(workdir: epath.PathLike) -> Iterator[None]:
    """Turns storage errors of the first use of a workdir into a `ConfigError`."""
    check_reachable(workdir)
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
    make_way_for_file(path)
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
        write_atomically(path, json_bytes(values))


def json_bytes(values: Any) -> bytes:
    """Returns JSON values as the text of a file."""
    return f"{json.dumps(values, indent=2, ensure_ascii=False)}\n".encode()


@contextmanager
def write_errors(path: epath.PathLike) -> Iterator[None]:
    """Turns storage errors inside the block into a `UserError` that names `path`."""
    remedy = (
        "Free space or give another --workdir, then run the same command again: it resumes from the last checkpoint."
    )
    with storage_errors_as(UserError, f"Cannot write {path}", remedy):
        yield
