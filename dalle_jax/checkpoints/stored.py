"""One checkpoint as it lies on disk, read part by part; `Damaged` says which part is not as it was written, and why.

Orbax's handlers are used without its manager, around which the hosts would wait for each other: one of them may have
found damage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dalle_jax.checkpoints import checksums
from dalle_jax.errors import CheckpointError, UserError
from dalle_jax.pytree import PyTree
from dalle_jax.storage.errors import storage_cause


class Damaged(Exception):
    """A part of a checkpoint is not as it was written; the message names it and what is wrong."""


class StoredCheckpoint:
    """A folder with the items of a checkpoint.

    Every method raises `Damaged` where that part is, and leaves errors of storage and memory as they are.
    """

    def __init__(self, path: epath.Path):
        """Reads nothing but the checksums, if it was written with them."""
        self.path = path
        self._sums = None
        if (path / "checksums").exists():
            sums = self._json("checksums")
            with _damage("checksums"):
                if sums.pop("these") != checksums.of_json(sums):
                    raise ValueError("changed since it was written")
            self._sums = sums

    def config(self) -> dict[str, Any]:
        """The configuration, as plain JSON values."""
        config = self._json("config")
        if self._sums is not None and checksums.of_json(config) != self._sums["config"]:
            raise Damaged("config: changed since it was written")
        return config

    def has(self, item: str) -> bool:
        """Whether it was written with arrays of that name."""
        return (self.path / item).exists() if self._sums is None else item in self._sums["arrays"]

    def abstract(self, item: str) -> PyTree:
        """The arrays of an item as values with shape and dtype."""
        with _damage(item):
            return ocp.StandardCheckpointHandler().metadata(self.path / item).tree

    def check_shapes(self, items: Mapping[str, PyTree]) -> None:
        """Compares the names and shapes of all arrays (without checksums: of parameters) with those in `items`.

        Raises:
          CheckpointError: the first array that is not the same; it was written by another model or optimizer.
        """
        arrays = self._sums["arrays"] if self._sums else {"params": checksums.shapes(self.abstract("params"))}
        for item, tree in items.items():
            other = checksums.other_shape(arrays[item], tree) if item in arrays else None
            if other:
                raise CheckpointError(
                    f"The checkpoint {self.path} cannot be read into this model: {item}: {other}. Give the options "
                    "that it was written with, or another --workdir."
                )

    def arrays(self, item: str, abstract: PyTree) -> PyTree:
        """The arrays of an item, with the dtypes and shardings of `abstract`; see `check_sums`."""
        with _damage(item):
            return ocp.StandardCheckpointHandler().restore(self.path / item, args=ocp.args.StandardRestore(abstract))

    def check_sums(self, items: Mapping[str, PyTree]) -> None:
        """Whether arrays that were read are those that were written, where that is known.  All hosts together."""
        for item, tree in items.items() if self._sums else ():
            changed = checksums.changed_array(self._sums["arrays"][item], tree)
            if changed:
                raise Damaged(f"{item}: {changed} changed since it was written")

    def place_in_data(self) -> bytes:
        """What `place_of` gave on this host, or on another one where there were not so many."""
        with _damage("data"):
            path = self.path / "data" / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
            if not path.exists():  # another number of hosts: every host counts the same global batches
                path = min((self.path / "data").glob("process_*.json"))
            state = path.read_text().encode()
            _place(state)
            return state

    def _json(self, item: str) -> Any:
        with _damage(item):
            return json.loads((self.path / item / "metadata").read_text())


class DataState:
    """Gives any iterator whose state is bytes or a JSON value the interface that grain's checkpoint handler expects."""

    def __init__(self, iterator: Any):
        self._iterator = iterator

    def get_state(self) -> bytes:
        state = self._iterator.get_state()
        place = {"bytes": state.decode()} if isinstance(state, bytes) else {"json": state}
        return json.dumps({**place, "checksum": checksums.of_json(place)}).encode()

    def set_state(self, state: bytes) -> None:
        ((kind, value),) = _place(state).items()
        self._iterator.set_state(value.encode() if kind == "bytes" else value)


def _place(state: bytes) -> dict[str, Any]:
    """What `DataState.get_state` wrote, without its checksum (older ones have none)."""
    place = json.loads(state)
    if place.pop("checksum", None) not in (None, checksums.of_json(place)) or len(place) != 1:
        raise ValueError("changed since it was written")
    return place


@contextmanager
def _damage(part: str) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # orbax and tensorstore raise whatever comes, `Exception` itself included
        if storage_cause(error) is not None:
            raise
        raise Damaged(f"{part}: {' '.join(str(error).split())[:200] or type(error).__name__}") from error
