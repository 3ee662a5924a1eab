"""Waiting for data with an end to it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from dalle_jax.errors import DataError, StuckDataError


class Patient(Iterator[Any]):
    """Another iterator's items, waited for no longer than a given time each.

    They are fetched by a daemon thread, one by one, when they are asked for: nothing is read ahead, and the other
    iterator's state is that after the item delivered last.  Nobody polls.
    """

    def __init__(self, iterator: Iterator[Any], seconds: float):
        """The thread starts with the first item asked for.

        Args:
          iterator: what is waited for; its `get_state`, `set_state` and `close` are passed on.
          seconds: the longest wait for one item.
        """
        self._iterator, self._seconds = iterator, seconds
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._waiting = False  # for an item; remains so where the time, or a Ctrl-C, ends the wait

    def __next__(self) -> Any:
        """The next item.

        Raises:
          StuckDataError: it did not come in time.
          DataError: a worker process behind the iterator is gone.
        """
        if self._waiting:
            raise self._too_late()
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch, name="data", daemon=True)
            self._thread.start()
        self._waiting = True
        self._asked.put(True)
        try:
            item, error = self._given.get(timeout=self._seconds)
            self._waiting = False
        except queue.Empty:
            raise self._too_late() from None
        if isinstance(error, RuntimeError) and "Worker process was terminated" in str(error):
            raise DataError(
                f"A worker process that reads the data is gone: {error} Often the machine ran out of memory: lower "
                "config.data.workers. The same command goes on from the last checkpoint."
            ) from error
        if error is not None:
            raise error
        return item

    def _fetch(self) -> None:
        while self._asked.get():
            try:
                self._given.put((next(self._iterator), None))
            except BaseException as error:  # StopIteration among them: whoever asked gets it
                self._given.put((None, error))

    def _too_late(self) -> StuckDataError:
        return StuckDataError(
            f"The data source delivered no batch for {self._seconds:g} seconds (config.timeout_seconds.data). Is the "
            "disk, or the network behind it, alive? A slow source needs more data.workers, or a longer time. The "
            "same command goes on from the last checkpoint."
        )

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)

    def close(self) -> None:
        """Ends the thread, and the workers behind the iterator; where they may be stuck they are left alone."""
        if self._waiting:
            return
        if self._thread is not None:
            self._asked.put(False)
            self._thread.join()
            self._thread = None
        getattr(self._iterator, "close", lambda: None)()
