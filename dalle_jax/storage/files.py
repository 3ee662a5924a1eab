"""Workdirs on a disk or on object storage ("gs://bucket/run"): what they need beyond `etils.epath`.

Whatever a run writes goes through `epath`, its checkpoints through orbax and tensorstore.  An object is written whole
or not at all, and nothing can be appended to it.  Files that grow (metrics.jsonl, TensorBoard's events) are therefore
written into a local `Mirror`, from where whole files are copied.

`gs://` needs gcsfs (`pip install 'dalle_jax[gcs]'`) and Google's usual credentials.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from etils import epath

from dalle_jax.errors import ConfigError, UserError

_CLIENTS = ("gcsfs", "aiohttp", "google")  # packages whose errors are about the storage


# Listings of a bucket are asked for anew each time: tensorstore and other processes write there too.
fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` is on object storage."""
    return "://" in str(path)


def full_path(path: epath.PathLike) -> epath.Path:
    """The path from the root, `~` expanded (`absolute` of etils takes "gs://…" for a relative path)."""
    path = epath.Path(path).expanduser()
    return path if is_remote(path) else path.absolute()


def make_workdir(workdir: epath.PathLike) -> str:
    """Makes the directory of a run, if needed, and gives its full name.

    Raises:
      ConfigError: where it cannot be made; on object storage, also where there is no such bucket, or no access to it.
    """
    path = epath.Path(workdir).expanduser()
    with access(workdir):
        if is_remote(path):
            scheme, _, bucket = str(path).split("/")[:3]
            if not epath.Path(f"{scheme}//{bucket}").exists():
                raise FileNotFoundError(2, f"there is no bucket {bucket!r}, or no access to it")
        path.mkdir(parents=True, exist_ok=True)
    return str(path)


@contextmanager
def access(workdir: epath.PathLike) -> Iterator[None]:
    """Context of the first use of a workdir: what the storage raises becomes a `ConfigError`."""
    with _storage_errors(ConfigError, f"Cannot use {str(workdir)!r} as the workdir", "Give another --workdir."):
        try:
            yield
        except ImportError as error:
            if not is_remote(workdir):
                raise
            raise ConfigError(
                f"Cannot use {str(workdir)!r} as the workdir: {error}. Install what it needs: "
                "pip install 'dalle_jax[gcs]'."
            ) from error


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Writes a file that nobody finds half written, whenever the process ends; makes its folder where needed."""
    path = epath.Path(path)
    if is_remote(path):
        path.write_bytes(content)  # an object is there when it is whole
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
    """`write_whole` of a JSON document.

    Raises:
      UserError: where it cannot be written.
    """
    with write_errors(path):
        write_whole(path, f"{json.dumps(values, indent=2, ensure_ascii=False)}\n".encode())


@contextmanager
def write_errors(path: epath.PathLike) -> Iterator[None]:
    """Context in which what the storage raises becomes a `UserError` that names `path`."""
    remedy = (
        "Free space or give another --workdir, then run the same command again: it goes on from the last checkpoint."
    )
    with _storage_errors(UserError, f"Cannot write {path}", remedy):
        yield


def remote_cause(error: BaseException) -> str | None:
    """What a client of object storage says is wrong, in one line; None for an error of another kind."""
    plain = type(error) is OSError and error.errno is None  # gcsfs raises these for what a server refuses
    return _told(error) if plain or type(error).__module__.split(".")[0] in _CLIENTS else None


@contextmanager
def _storage_errors(kind: type[UserError], failure: str, remedy: str) -> Iterator[None]:
    """Context in which what the storage raises becomes a `kind` of error; all else stays as it is."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and remote_cause(error) is None:
            raise
        raise kind(f"{failure}: {_told(error)}. {remedy}") from error


def _told(error: BaseException) -> str:
    """What went wrong, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
