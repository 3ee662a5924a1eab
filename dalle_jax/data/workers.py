"""Signals and lifetime of the worker processes that read data: they live exactly as long as their training.

Ctrl-C in a terminal, a batch system and a shutdown send their signal to every process. The training answers by saving,
for which it may still need a batch, so its workers ignore these signals. A killed training cannot stop its workers, so
they watch whether it is still alive.
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


def init_worker(index: int, count: int) -> None:
    """Ignores stop signals and ends this worker when its training ends; grain's `worker_init_fn`.

    Args:
      index: this worker's number (unused).
      count: the number of workers (unused).
    """
    del index, count
    for number in _STOP:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_training, name="training", daemon=True).start()


def _end_with_the_training() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Blocks SIGTERM and SIGINT while worker processes start, so that they inherit the blocked mask.

    Without it a signal could end a worker before `init_worker` runs. Only the calling thread is affected.
    """
    # Python starts its resource tracker with unblocked signals and leaves them unblocked. Start it before that.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
