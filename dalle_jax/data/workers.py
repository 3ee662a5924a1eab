"""Processes that read data, and when they end: with their training, neither before it nor after.

Ctrl-C in a terminal, a batch system and a machine that shuts down signal every process there is.  The training answers
by saving, for which it may still need a batch, so its workers do not listen.  A training that is killed tells nobody,
so they watch whether it is there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

_STOP = (signal.SIGTERM, signal.SIGINT)


def begin(index: int, count: int) -> None:
    """What a worker does first (grain's `worker_init_fn`)."""
    del index, count
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_training, name="training", daemon=True).start()


def _end_with_the_training() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """Context whose new processes do not hear SIGTERM and Ctrl-C from their first moment, before they can `begin`.

    The thread that enters it does not hear them either, until it leaves; others do.
    """
    resource_tracker.ensure_running()  # whoever starts this process of Python's own ends up hearing them again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
