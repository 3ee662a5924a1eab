"""One command at a time prepares a data set; leftovers of killed commands are removed.

A lock file next to the data set is held with `flock`, which the kernel releases when a process ends in any way. Across
hosts `distributed.turns.first_host_first` gives the order. Remote file systems have no locks.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

from absl import logging
from etils import epath

from dalle_jax.storage.file_lock import try_lock
from dalle_jax.storage.files import is_remote

_LOCK = ".preparing"
_INCOMPLETE = "incomplete.*"  # TFDS's name of a folder that it is writing
_SECONDS_BETWEEN_TRIES = 0.2


@contextlib.contextmanager
def only_one_prepares(folder: epath.PathLike, what: str) -> Iterator[None]:
    """Waits until no other process prepares this data set, then removes what killed ones have left.

    Args:
      folder: the data set's folder for one version. The lock stands next to it.
      what: name of the data set, for messages.
    """
    if is_remote(folder):
        yield
        return
    place = pathlib.Path(folder).parent
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place, what) as locked:
        if locked:
            for other in place.parent.iterdir():
                _remove_leftovers(other, held=other == place)
        yield


@contextlib.contextmanager
def _locked(place: pathlib.Path, what: str) -> Iterator[bool]:
    """Holds the lock of a folder; yields False if its file system has none."""
    with open(place / _LOCK, "a+b") as file:
        waiting = False
        while (taken := try_lock(file)) is False:
            if not waiting:
                waiting = True
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "unknown"
                logging.info("Waiting for process %s, which prepares the data set %s in %s.", holder, what, place)
            time.sleep(_SECONDS_BETWEEN_TRIES)
        if taken is None:
            logging.warning("%s cannot be locked: do not start two commands that prepare one data set.", place)
        else:
            file.truncate(0)
            file.write(f"{os.getpid()}\n".encode())
            file.flush()
        yield taken is True


def _remove_leftovers(place: pathlib.Path, held: bool) -> None:
    """Removes incomplete folders of one configuration, unless another process is writing them."""
    if not place.is_dir() or not (found := list(place.glob(_INCOMPLETE))):
        return
    with open(place / _LOCK, "a+b") as file:
        if held or try_lock(file):
            for folder in found:
                logging.info("Removing %s, which a killed process has left.", folder)
                shutil.rmtree(folder, ignore_errors=True)
