"""Moves host batches to the devices ahead of time, without losing count of what the training has seen."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import jax

from dalle_jax.distributed.rows import to_mesh


class prefetch_to_mesh(Iterator[dict[str, jax.Array]]):
    """Global arrays from this host's rows, `size` batches ahead of the step that uses them.

    The copy to the device is asynchronous: a batch handed out now was sent off `size` batches ago.
    `get_state` tells the place after the last batch *handed out*, not after the last one read, so a
    checkpoint repeats nothing and leaves nothing out.
    """

    def __init__(self, iterator: Iterator[dict[str, Any]], sharding: jax.sharding.NamedSharding, size: int = 2):
        """Starts nothing yet: the first batch asked for does.

        Args:
          iterator: of host batches, each array with this host's rows; with `get_state()` and `set_state()`, see
            `tasks.Job.train_batches`.
          sharding: of the leading axis of every array, over all hosts.
          size: how many batches to keep on the devices beside the one in use; 0 sends each when asked for.
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
        """The iterator's state after the last batch handed out."""
        return self._state

    def set_state(self, state: Any) -> None:
        """Drops what was sent ahead and goes to the place that `get_state` told."""
        self._iterator.set_state(state)
        self._sent.clear()
        self._state = self._iterator.get_state()

    def start_prefetch(self) -> None:
        """Part of grain's checkpoint protocol; sending starts with the next batch."""

    def close(self) -> None:
        """Ends the workers behind the iterator."""
        self._sent.clear()
        getattr(self._iterator, "close", lambda: None)()
