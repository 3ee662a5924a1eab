"""One checkpoint on disk, read part by part. `Damaged` names the part that changed since it was written, and how.

This module uses orbax's handlers without its manager, because the manager makes hosts wait for each other. One host
may have found damage and left.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
from etils import epath

from dalle_jax.checkpoints import checksums
from dalle_jax.errors import CheckpointError, UserError
from dalle_jax.pytree import PyTree, first_mismatch
from dalle_jax.storage import json_files
from dalle_jax.storage.errors import storage_cause


class Damaged(Exception):
    """A part of a checkpoint changed since it was written. The message names the part and the problem."""


class StoredCheckpoint:
    """A folder with the items of a checkpoint.

    Every method raises `Damaged` if its part is damaged. Errors of storage and memory pass unchanged.
    """

    def __init__(self, path: epath.Path):
        """Reads the checksums only, if there are any. Early versions wrote none."""
        self.path = path
        self._sums = None
        if (path / "checksums").exists():
            sums = self._json("checksums")
            with _damage("checksums"):
                if sums.pop("these") != checksums.of_json(sums):
                    raise ValueError("changed since it was written")
                self._check_step(sums)
            self._sums = sums

    def _check_step(self, part: dict[str, Any]) -> None:
        """Compares the step that a part was written at, if it names one, with that of this checkpoint."""
        if part.get("step", int(self.path.name)) != int(self.path.name):
            raise ValueError(f"belongs to step {part['step']}")

    def config(self) -> dict[str, Any]:
        """Reads the configuration as JSON values."""
        config = self._json("config")
        if self._sums is not None and checksums.of_json(config) != self._sums["config"]:
            raise Damaged("config: changed since it was written")
        return config

    def has(self, item: str) -> bool:
        """Returns whether the checkpoint was written with an item of this name."""
        return (self.path / item).exists() if self._sums is None else item in self._sums["arrays"]

    def abstract(self, item: str) -> PyTree:
        """Reads the shapes and dtypes of an item's arrays."""
        with _damage(item):
            return ocp.StandardCheckpointHandler().metadata(self.path / item).tree

    def check_shapes(self, items: Mapping[str, PyTree]) -> None:
        """Compares the names and shapes of all arrays with those in `items`.

        Without checksums, only those of the parameters are compared.

        Raises:
          CheckpointError: another model or optimizer wrote the checkpoint. The message names the first difference.
        """
        for item, tree in items.items():
            shapes = self._shapes(item)
            if shapes is not None and (mismatch := first_mismatch(shapes, tree)):
                name, stored, given = mismatch
                raise CheckpointError(
                    f"The checkpoint {self.path} cannot be read into this model: {item}: {name} is {stored} there, "
                    f"{given} here. Give the options that it was written with, or another --workdir."
                )

    def _shapes(self, item: str) -> PyTree | None:
        """Returns the abstract arrays of an item by name, or None if they are unknown."""
        if self._sums is None:
            return self.abstract(item) if item == "params" else None
        if item not in self._sums["arrays"]:
            return None
        arrays = self._sums["arrays"][item].items()
        return {name: jax.ShapeDtypeStruct(x["shape"], x["dtype"]) for name, x in arrays}

    def arrays(self, item: str, abstract: PyTree) -> PyTree:
        """Reads the arrays of an item with the dtypes and shardings of `abstract`, unverified; see `check_sums`."""
        with _damage(item):
            return ocp.StandardCheckpointHandler().restore(self.path / item, args=ocp.args.StandardRestore(abstract))

    def check_sums(self, items: Mapping[str, PyTree]) -> None:
        """Compares arrays with their checksums, if there are any. All hosts must call it together."""
        for item, tree in items.items() if self._sums else ():
            changed = checksums.changed_array(self._sums["arrays"][item], tree)
            if changed:
                raise Damaged(f"{item}: {changed} changed since it was written")

    def check_metrics(self, metrics: Any) -> None:
        """Compares the metrics of this checkpoint, or None, with their checksum, if there is one."""
        if not isinstance(metrics, Mapping | None):
            raise Damaged("metrics: not a JSON object")
        expected = {} if self._sums is None else self._sums
        if expected.get("metrics", checksums.of_json(metrics)) != checksums.of_json(metrics):
            raise Damaged("metrics: changed since they were written")

    def check_frozen(self, frozen: str | None) -> None:
        """Compares the fingerprint of the frozen modules with the one at writing, if both are known.

        Raises:
          CheckpointError: the parameters were trained with other frozen modules.
        """
        stored = None if self._sums is None else self._sums.get("frozen")
        if stored and frozen and stored != frozen:
            raise CheckpointError(
                f"The checkpoint {self.path} was trained with another image tokenizer than the one in image_tokenizer/ "
                "next to it: put that one back, from a copy of the workdir or by --config.tokenizer_from and "
                "--config.tokenizer_step. Or start in another --workdir."
            )

    def place_in_data(self) -> bytes:
        """Reads what `DataState.get_state` returned on this host, or on another one if the number of hosts changed."""
        with _damage("data"):
            path = self.path / "data" / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
            if not path.exists():  # another number of hosts: every host counts the same global batches
                path = min((self.path / "data").glob("process_*.json"))
            state = path.read_text().encode()
            self._check_step(_place(state))
            return state

    def _json(self, item: str) -> Any:
        with _damage(item):
            return json_files.parse((self.path / item / "metadata").read_bytes())


class DataIterator(Protocol):
    """An iterator that can return its place and go back to it."""

    def get_state(self) -> Any:
        """Returns the place after the last item delivered, as bytes or a JSON value."""

    def set_state(self, state: Any) -> None:
        """Moves to a place that `get_state` returned."""


class DataState:
    """Describes the place of a `DataIterator` for grain's checkpoint handler. `step` is that of the checkpoint."""

    def __init__(self, iterator: DataIterator, step: int):
        self._iterator, self._step = iterator, step

    def get_state(self) -> bytes:
        state = self._iterator.get_state()
        place = {"bytes": state.decode()} if isinstance(state, bytes) else {"json": state}
        place["step"] = self._step
        return json.dumps({**place, "checksum": checksums.of_json(place)}).encode()


def move_to(iterator: DataIterator, state: bytes) -> None:
    """Moves an iterator to the place that `DataState.get_state` returned."""
    place = _place(state)
    iterator.set_state(place["bytes"].encode() if "bytes" in place else place["json"])


def _place(state: bytes) -> dict[str, Any]:
    """Returns what `DataState.get_state` wrote, without its checksum. Early versions wrote no checksum and no step."""
    place = json_files.parse(state)
    if "checksum" in place:
        intact = place.pop("checksum") == checksums.of_json(place) and place.keys() & {"bytes", "json"}
    else:
        intact = place.keys() in ({"bytes"}, {"json"})
    if not intact:
        raise ValueError("changed since it was written")
    return place


@contextmanager
def _damage(part: str) -> Iterator[None]:
    """Converts errors inside the block into `Damaged`, except those of storage, memory and the user."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # orbax and tensorstore raise many types, `Exception` itself included
        if storage_cause(error) is not None:
            raise
        raise Damaged(f"{part}: {' '.join(str(error).split())[:200] or type(error).__name__}") from error
