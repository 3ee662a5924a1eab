"""Recognises errors of disks and object storage, and describes them in one line."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from dalle_jax.errors import UserError

_CLIENTS = ("gcsfs", "aiohttp", "google")  # packages whose errors are about the storage
_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
_MEANINGS = {
    "No space left on device": "no space left on the device",
    "RESOURCE_EXHAUSTED": "no space left on the device",
    "Disk quota exceeded": "disk quota exceeded",
    "File too large": "file too large for this file system or its limits",
    "Permission denied": "permission denied",
    "PERMISSION_DENIED": "permission denied",
    "UNAUTHENTICATED": "no valid credentials",
    "Read-only file system": "read-only file system",
    "UNAVAILABLE": "the storage cannot be reached",
    "DEADLINE_EXCEEDED": "the storage does not answer in time",
}


def storage_cause(error: BaseException | None) -> str | None:
    """Describes the storage failure in a chain of errors.

    Args:
      error: the error to look at, then its causes and contexts in turn.

    Returns:
      One line, or None if no error of the chain is about the storage.
    """
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):  # devices and other hosts use the same words
            error = error.__cause__ or error.__context__
            continue
        if isinstance(error, OSError) and error.errno in _ERRNOS:
            cause = error.strerror or str(error)
            return cause[:1].lower() + cause[1:]
        if cause := _remote_cause(error):
            return cause
        for text, meaning in _MEANINGS.items():
            if text.lower() in str(error).lower():
                return meaning
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def storage_errors_as(kind: type[UserError], failure: str, remedy: str) -> Iterator[None]:
    """Turns storage errors inside the block into user errors; other errors pass unchanged.

    Args:
      kind: class of the error to raise.
      failure: start of its message, such as "Cannot write runs/a/config.json".
      remedy: end of its message, one or more sentences.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and _remote_cause(error) is None:
            raise
        raise kind(f"{failure}: {_one_line(error)}. {remedy}") from error


def _remote_cause(error: BaseException) -> str | None:
    """Describes an error that a client of object storage raised. Returns None for any other error."""
    plain = type(error) is OSError and error.errno is None  # gcsfs raises these when a server rejects a request
    return _one_line(error) if plain or type(error).__module__.split(".")[0] in _CLIENTS else None


def _one_line(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__
