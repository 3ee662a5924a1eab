"""A local folder whose files are copied to object storage."""

from __future__ import annotations

import pathlib
import tempfile
import time

from absl import logging
from etils import epath

from dalle_jax.errors import UserError
from dalle_jax.storage.files import is_remote, write_errors

_UPLOAD_SECONDS = 60.0


class Mirror:
    """A local copy of a folder that may be on object storage.

    If the target is a local folder, the mirror is that folder and copies nothing.
    """

    def __init__(self, target: epath.PathLike):
        """Creates the local folder. Copies nothing, see `fetch`.

        Args:
          target: the folder to mirror.
        """
        self._target = epath.Path(target)
        self._temporary = tempfile.TemporaryDirectory(prefix="dalle_jax_") if is_remote(target) else None
        self._copied: dict[pathlib.Path, tuple[int, int]] = {}  # size and modification time at the last copy
        self._uploaded = time.monotonic()
        self.folder = pathlib.Path(self._temporary.name if self._temporary else self._target)

    def fetch(self, name: str) -> None:
        """Copies a file from the target into the local folder, if it exists."""
        if self._temporary and (self._target / name).exists():
            (self.folder / name).write_bytes((self._target / name).read_bytes())

    def upload(self) -> None:
        """Copies all files that have changed since the last upload.

        Raises:
          UserError: a file cannot be written.
        """
        if not self._temporary:
            return
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            status = path.stat()
            version = (status.st_size, status.st_mtime_ns)
            if self._copied.get(path) != version:
                target = self._target / path.relative_to(self.folder).as_posix()
                with write_errors(target):
                    target.write_bytes(path.read_bytes())
                self._copied[path] = version
        self._uploaded = time.monotonic()

    def upload_now_and_then(self) -> None:
        """Calls `upload` at most once a minute. A failure is logged, and the next call tries again."""
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self._uploaded = time.monotonic()
            try:
                self.upload()
            except UserError as error:
                logging.warning("%s", error)

    def close(self) -> None:
        """Uploads what has changed and removes the local folder. Does nothing if that folder is the target."""
        if self._temporary:
            try:
                self.upload()
            finally:
                self._temporary.cleanup()
