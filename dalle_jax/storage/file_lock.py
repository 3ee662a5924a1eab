"""The lock of an open local file (`flock`). The kernel releases it when its process ends in any way."""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not a Unix system
    fcntl = None

_locked: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def try_lock(file: BinaryIO) -> bool | None:
    """Tries to lock an open local file; returns None if its file system, or this system, has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    _close_in_forked_processes()
    _locked.add(file)
    return True


@functools.cache
def _close_in_forked_processes() -> None:
    """Closes locked files in forked processes, which would otherwise keep a lock after the death of their parent."""

    def close() -> None:
        for file in list(_locked):
            with contextlib.suppress(OSError):
                file.close()

    os.register_at_fork(after_in_child=close)
