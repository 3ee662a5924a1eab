"""Workdirs on a disk or on object storage ("gs://bucket/run"): paths, atomic writes, error messages.

All files of a run are written with `etils.epath`, its checkpoints with orbax and tensorstore. Object storage writes an
object completely or not at all, and cannot append to it. Files that grow (metrics.jsonl, TensorBoard's events) are
therefore written to a local `Mirror`, which uploads whole files.

Every other file is written by `write_file` or `write_atomically`: under a temporary name in the same folder, which then
replaces the old file. A process that is killed in between leaves "NAME.xxxxxxxx.unfinished" (eight hexadecimal digits).
The next run removes it, see `remove_unfinished`.

`gs://` needs gcsfs (`pip install 'dalle_jax[gcs]'`) and Google's usual credentials.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import fsspec
from etils import epath

from dalle_jax.errors import ConfigError, UserError
from dalle_jax.storage.errors import storage_errors_as
from dalle_jax.storage.file_lock import try_lock
from dalle_jax.storage.obstacles import make_way_for_file
from dalle_jax.storage.reachable import check_reachable

_UNFINISHED = re.compile(r".+\.[0-9a-f]{8}\.unfinished", re.DOTALL)
_TOO_SMALL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_remote(path: epath.PathLike) -> bool:
    """Returns whether `path` is on object storage."""
    return "://" in str(path)


def expanded(path: epath.PathLike) -> epath.Path:
    """Returns `path` as an `epath.Path` with `~` expanded and without "file://".

    Every path that a user gives passes through here before its file system is opened, see `disable_listings_cache`.
    """
    text = os.fspath(path)
    if text.startswith("hf://"):  # fsspec would read it file by file over the network
        raise ConfigError(
            f"{text!r} cannot be opened here: give a directory, or gs://BUCKET/DIR. Addresses of a hub stand for "
            "exported models (model_workdir, clip, start_from, tokenizer_from) and for --weights."
        )
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


def is_other_than_file(path: epath.PathLike) -> bool:
    """Returns whether a local path leads to a folder, a pipe or a device. Reading a pipe would never end."""
    return not is_remote(path) and os.path.exists(path) and not os.path.isfile(path)


def full_path(path: epath.PathLike) -> epath.Path:
    """Returns the absolute path, with `~` expanded. (`absolute` of etils treats "gs://…" as a relative path.)"""
    path = expanded(path)
    return path if is_remote(path) else path.absolute()


def make_workdir(workdir: epath.PathLike) -> str:
    """Creates a workdir if it does not exist, and returns its name with `~` expanded.

    Removes what killed runs left in it and in its folders, see `remove_unfinished`.

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
        remove_unfinished(path)
    return str(path)


def check_writable(workdir: epath.PathLike) -> epath.Path:
    """Creates a workdir if it does not exist, and tests that files can be written there.

    Raises:
      ConfigError: they cannot.
    """
    made = expanded(make_workdir(workdir))
    # Nobody has a file with this name, and the next run removes it if this one is killed here.
    trial = made / ("writable.trial" if is_remote(made) else f"writable.{secrets.token_hex(4)}.unfinished")
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

    A link at `path` is replaced; the file that it names is not touched.

    Args:
      path: local or remote file.
      content: all its bytes.

    Raises:
      OSError: the file cannot be written. Without enough space, the message holds the space needed and left, in bytes.
    """
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(content)  # an object appears only when it is complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    make_way_for_file(path)
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "xb") as file:
            try_lock(file)  # `remove_unfinished` of other processes leaves it alone
            file.write(content)
            file.flush()
            unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _TOO_SMALL:
            left = f", {shutil.disk_usage(path.parent).free:,} left" if error.errno == errno.ENOSPC else ""
            raise OSError(error.errno, f"{error.strerror} ({len(content):,} bytes needed{left})", str(path)) from error
        raise


def write_file(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file atomically.

    Args:
      path: local or remote file.
      content: all its bytes, or its text, which is written as UTF-8.

    Raises:
      UserError: the file cannot be written.
    """
    with write_errors(path):
        write_atomically(path, content.encode() if isinstance(content, str) else content)


def remove_unfinished(folder: epath.PathLike) -> None:
    """Removes the unfinished files that killed processes left in a folder and in the folders directly inside it.

    Files that a living process is writing stay, and so do links and all files with other names.

    Args:
      folder: local or remote. Object storage holds no unfinished objects.
    """
    folder = expanded(folder)
    if is_remote(folder):
        return
    for place in (folder, *(inside for inside in folder.iterdir() if inside.is_dir())):
        with suppress(OSError):  # a folder that cannot be read or changed
            for entry in list(os.scandir(place)):
                if _UNFINISHED.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    _remove_unless_locked(entry.path)


def _remove_unless_locked(path: str) -> None:
    with suppress(OSError), open(path, "r+b") as file:
        if try_lock(file):
            os.unlink(path)


def write_json(path: epath.PathLike, values: Any) -> None:
    """Writes a JSON document atomically.

    Raises:
      UserError: the file cannot be written.
    """
    write_file(path, json_bytes(values))


def json_bytes(values: Any) -> bytes:
    """Returns JSON values as the text of a file."""
    return f"{json.dumps(values, indent=2, ensure_ascii=False)}\n".encode()


@contextmanager
def write_errors(path: epath.PathLike) -> Iterator[None]:
    """Turns storage errors inside the block into a `UserError` that names `path`."""
    remedy = (
        "Free space or give another --workdir, then run the same command again. A training resumes from its last "
        "checkpoint."
    )
    with storage_errors_as(UserError, f"Cannot write {path}", remedy):
        yield
