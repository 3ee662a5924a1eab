"""Locks on files: of a local disk by `flock`, of a bucket by the generation of an object.

The kernel releases a local lock when its process ends in any way. A bucket does not notice that a process has ended, so
the content of the object must show it: `ownership` refreshes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import BinaryIO, Protocol

import fsspec
from etils import epath

from dalle_jax.storage.file_lock import try_lock
from dalle_jax.storage.files import is_remote

_OBJECT = "b/{}/o/{}"  # of Google's JSON interface
_SECONDS_TO_NAME_ITSELF = 2.0  # between the lock and the content that names the new holder


class Held(Exception):
    """Another process holds the lock.

    Attributes:
      content: of its file.
    """

    def __init__(self, content: bytes):
        super().__init__()
        self.content = content


class Lock(Protocol):
    """A lock with content that names its holder.

    Attributes:
      atomic: whether two processes can never take it at once.
    """

    atomic: bool

    def take(self, content: bytes, replaceable: Callable[[bytes, bool], bool]) -> bytes:
        """Takes the lock and writes the content.

        Args:
          content: names the new holder.
          replaceable: of the content that is there and of whether the kernel says that nobody holds the lock. Returns
            whether the lock may be taken.

        Returns:
          The content of an earlier holder that did not release the lock, or b"".

        Raises:
          Held: another process holds it.
        """

    def refresh(self, content: bytes) -> bool:
        """Writes other content. Returns False if another process has taken the lock."""

    def read(self) -> bytes | None:
        """Returns the content that is there now, or None without the file."""

    def release(self) -> None:
        """Removes the file, unless another process has taken the lock."""


def make_lock(path: epath.PathLike) -> Lock:
    """Returns the lock of a local file or of an object of a bucket. It is not taken."""
    return _ObjectLock(epath.Path(path)) if is_remote(path) else _FileLock(pathlib.Path(path))


class _FileLock:
    """A local file, locked by `flock` as long as this process lives."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file: BinaryIO | None = None
        self.atomic = True

    def take(self, content: bytes, replaceable: Callable[[bytes, bool], bool]) -> bytes:
        deadline = time.monotonic() + _SECONDS_TO_NAME_ITSELF
        while True:
            file = open(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
            taken = try_lock(file)
            self.atomic = taken is not None
            if taken is not False and not self._is_there(file):  # its holder has removed it in the meantime
                file.close()
                continue
            found = file.read()
            if taken is not False and (not found or replaceable(found, taken is True)):
                self._file = file
                _overwrite(file, content)
                return found
            file.close()
            # A holder takes the lock first and names itself then. Until then another one may stand there, or nobody.
            if taken is not False or (found and not replaceable(found, False)) or time.monotonic() > deadline:
                raise Held(found)
            time.sleep(0.02)

    def _is_there(self, file: BinaryIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def refresh(self, content: bytes) -> bool:
        _overwrite(self._file, content)
        return self._is_there(self._file)

    def read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                if self._is_there(self._file):
                    self._path.unlink()
            self._file.close()
            self._file = None


def _overwrite(file: BinaryIO, content: bytes) -> None:
    file.seek(0)
    file.write(content)
    file.truncate()


class _ObjectLock:
    """An object of a bucket. On Google's storage, each change requires the generation that was read.

    Other stores know no condition. There, two processes that start in the same second can both take the lock.
    """

    def __init__(self, path: epath.Path):
        self._path = path
        scheme, _, name = str(path).partition("://")
        self._fs = fsspec.filesystem("gcs") if scheme == "gs" else None
        self._bucket, _, self._key = name.partition("/")
        self._generation = "0"
        self.atomic = self._fs is not None

    def take(self, content: bytes, replaceable: Callable[[bytes, bool], bool]) -> bytes:
        while True:
            found, generation = self._get()
            if found and not replaceable(found, False):
                raise Held(found)
            if self._put(content, generation):
                return found or b""

    def refresh(self, content: bytes) -> bool:
        return self._put(content, self._generation)

    def read(self) -> bytes | None:
        return self._get()[0]

    def release(self) -> None:
        if self._fs is None:
            self._path.unlink(missing_ok=True)
            return
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            self._fs.call("DELETE", _OBJECT, self._bucket, self._key, ifGenerationMatch=self._generation)

    def _get(self) -> tuple[bytes | None, str]:
        """Returns the content and the generation of the object; (None, "0") without one."""
        try:
            if self._fs is None:
                return self._path.read_bytes(), "0"
            headers, content = self._fs.call("GET", _OBJECT, self._bucket, self._key, alt="media")
            return content, {key.lower(): value for key, value in headers.items()}["x-goog-generation"]
        except FileNotFoundError:
            return None, "0"

    def _put(self, content: bytes, generation: str) -> bool:
        """Writes the object if it still has this generation; returns whether it is written."""
        if self._fs is None:
            self._path.write_bytes(content)
            return True
        parts = [("application/json", json.dumps({"name": self._key}).encode()), ("application/json", content)]
        body = b"".join(b"--==0==\nContent-Type: %s\n\n%s\n" % (kind.encode(), part) for kind, part in parts)
        try:
            answer = self._fs.call(
                "POST",
                f"{self._fs.base.removesuffix('storage/v1/')}upload/storage/v1/b/{self._bucket}/o",
                uploadType="multipart",
                headers={"Content-Type": 'multipart/related; boundary="==0=="'},
                data=body + b"--==0==--",
                ifGenerationMatch=generation,
            )
        except FileExistsError:  # the condition failed, perhaps because the answer to an earlier try was lost
            found, now = self._get()
            if found != content:
                return False
            self._generation = now
            return True
        self._generation = json.loads(answer[1])["generation"]
        return True
