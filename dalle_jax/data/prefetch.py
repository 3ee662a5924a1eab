"""Copies host batches to the devices ahead of time, and keeps track of the batches that the training has used."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import jax

from dalle_jax.distributed.rows import to_mesh


class prefetch_to_mesh(Iterator[dict[str, jax.Array]]):
    """Global arrays from this host's rows, copied `size` batches before the step that uses them.

    The copy to the device is asynchronous: it began `size` batches before the batch is handed out. `get_state` returns
    the place after the last batch *handed out*, not after the last one read. A run that resumes from a checkpoint
    therefore repeats no batch and skips none.
    """

    def __init__(self, iterator: Iterator[dict[str, Any]], sharding: jax.sharding.NamedSharding, size: int = 2):
        """Starts nothing yet: the first batch does.

        Args:
          iterator: gives host batches, each array with this host's rows; has `get_state()` and `set_state()`, see
            `tasks.task.Job.train_batches`.
          sharding: sharding of the leading axis of every array, over all hosts.
          size: number of batches to keep on the devices in addition to the one in use; 0 copies each when requested.
        """
        self._iterator, self._sharding, self._size = iterator, sharding, size
        self._sent: collections.deque[tuple[dict[str, jax.Array], Any]] = collections.deque()
        self._state = iterator.get_state()

    def __next__(self) -> dict[str, jax.Array]:
        while len(self._sent) <= self._size:
            try:
                batch = next(self._iterator)
            except StopIteration:
                break
            self._sent.append((to_mesh(batch, self._sharding), self._iterator.get_state()))
        if not self._sent:
            raise StopIteration
        batch, self._state = self._sent.popleft()
        return batch

    def get_state(self) -> Any:
        """Returns the iterator's state after the last batch handed out."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Drops the prefetched batches and moves to a place that `get_state` returned."""
        self._iterator.set_state(state)
        self._sent.clear()
        self._state = self._iterator.get_state()

    def start_prefetch(self) -> None:
        """Does nothing: part of grain's checkpoint protocol. Copying starts with the next batch."""

    def close(self) -> None:
        """Ends the workers behind the iterator."""
        self._sent.clear()
        getattr(self._iterator, "close", lambda: None)()
