"""Opens each data set once at the start of a job, although several parts of the start look at it.

with opened_once():
    ...  # `open_source` with equal arguments returns the same source, and a folder is listed once
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

T = TypeVar("T")

_kept: contextvars.ContextVar[dict[Hashable, object] | None] = contextvars.ContextVar("opened_once", default=None)


@contextlib.contextmanager
def opened_once() -> Iterator[None]:
    """Keeps what `once` makes until the end of the block. A block inside another one shares the outer one's.

    Changes of files are not seen inside the block, so it should not contain a training.
    """
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


def once(key: Hashable, make: Callable[[], T]) -> T:
    """Returns `make()`, or the earlier result for an equal key if both calls are in one `opened_once` block."""
    kept = _kept.get()
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]
