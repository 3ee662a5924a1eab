"""An iterator with a timeout per item."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

from dalle_jax.errors import DataError, StuckDataError


class TimeoutIterator(Iterator[Any]):
    """Wraps an iterator and raises an error if an item takes longer than the timeout.

    A daemon thread fetches each item on request and never reads ahead. The wrapped iterator's state is therefore always
    the state after the last delivered item. No thread polls.
    """

    def __init__(self, iterator: Iterator[Any], seconds: float):
        """Starts no thread yet: the first item does.

        Args:
          iterator: the iterator to wrap; its `get_state`, `set_state` and `close` are passed on.
          seconds: the longest wait for one item.
        """
        self._iterator, self._seconds = iterator, seconds
        self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._given: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._waiting = False  # for an item; stays True after a timeout or a Ctrl-C

    def __next__(self) -> Any:
        """Returns the next item.

        Raises:
          StuckDataError: if it did not come in time.
          DataError: if a worker process behind the iterator died.
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
                f"A worker process that reads the data has died: {error} Often the machine ran out of memory: lower "
                "config.data.workers. The same command resumes from the last checkpoint."
            ) from error
        if error is not None:
            raise error
        return item

    def _fetch(self) -> None:
        while self._asked.get():
            try:
                self._given.put((next(self._iterator), None))
            except BaseException as error:  # including StopIteration: `__next__` raises it to its caller
                self._given.put((None, error))

    def _too_late(self) -> StuckDataError:
        return StuckDataError(
            f"The data source delivered no batch for {self._seconds:g} seconds (config.timeout_seconds.data). Check "
            "that the disk, or the network behind it, responds. For a slow source raise data.workers or the timeout. "
            "The same command resumes from the last checkpoint."
        )

    def get_state(self) -> Any:
        return self._iterator.get_state()

    def set_state(self, state: Any) -> None:
        self._iterator.set_state(state)

    def close(self) -> None:
        """Ends the thread and closes the wrapped iterator; does neither while an item is overdue, as both may hang."""
        if self._waiting:
            return
        if self._thread is not None:
            self._asked.put(False)
            self._thread.join()
            self._thread = None
        getattr(self._iterator, "close", lambda: None)()
