"""Checkpoints of a run: parameters, their average, the rest of the train state, the data iterator, the configuration.

    <workdir>/checkpoints/<step>/{params,ema,rest,data,config,checksums}

Parameters and average are items of their own, so that generation reads one of them and nothing else.  Writing is
asynchronous and atomic (orbax writes to a temporary folder and renames it; on object storage, it writes a mark when the
rest is there), so that a crash or a full disk never damages what is there.  A checkpoint can be read onto another mesh
and by another number of hosts.

What was damaged later (truncated, lost or changed files) is found when it is read: the checkpoint is named in a warning
and the one before it is used.  A training moves it aside, to `<step>.damaged`, and goes on.

Orbax stays behind this module and the two that it is made of, `checkpoint_manager` and `stored_checkpoint`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from dalle_jax.checkpoints import checksums
from dalle_jax.checkpoints.compatibility import check_same_model, to_json
from dalle_jax.checkpoints.manager import Manager
from dalle_jax.checkpoints.stored import Damaged, DataState, StoredCheckpoint
from dalle_jax.distributed.sharding import abstract
from dalle_jax.errors import CheckpointError
from dalle_jax.pytree import PyTree
from dalle_jax.storage.errors import storage_cause
from dalle_jax.storage.files import full_path, is_remote
from dalle_jax.training.step import TrainState

T = TypeVar("T")

_INTACT = (
    "Checkpoints written before are intact. Free space or mend access, then run the same command again: it goes on "
    "from the last one."
)


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        workdir: str,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        best_metric: str = "",
        read_only: bool = False,
    ):
        """Opens `<workdir>/checkpoints`.

        Args:
          workdir: directory of the run, local or remote ("gs://...").
          keep_last: how many of the latest checkpoints to keep.
          keep_best: how many of the best ones to keep besides.
          best_metric: which of the metrics given to `save` makes the best; lower is better.
          read_only: never write or delete anything.
        """
        self.directory = full_path(workdir) / "checkpoints"
        with self._storage_errors("open"):
            self._manager = Manager(
                self.directory,
                keep_last=keep_last,
                keep_best=keep_best,
                best_metric=best_metric,
                read_only=read_only,
            )
        self._damaged: set[int] = set()  # found while reading

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint, None where there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest best metric; the latest where none has been measured."""
        return self._manager.best_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints kept, rising, but those that were found damaged."""
        return sorted({*self._manager.all_steps()} - self._damaged)

    def save(
        self,
        step: int,
        state: TrainState,
        data_iterator: Any,
        config: ConfigDict,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write a checkpoint; returns when the state may be overwritten.

        Args:
          step: number of steps done; a step that is there already is left alone.
          state: the train state.
          data_iterator: the training iterator, having delivered `step` batches; its state is read now.
          config: the configuration of the run.
          metrics: evaluation at this very step, None where there was none.

        Raises:
          CheckpointError: this one, or the one before it, could not be written (a full disk).
        """
        if step in self._manager.all_steps():
            return
        self._check_space(state)
        arrays, given = _items(state), to_json(config)
        sums = {
            "arrays": {item: checksums.of_arrays(tree) for item, tree in arrays.items()},
            "config": checksums.of_json(given),
        }
        documents = {"config": given, "checksums": {**sums, "these": checksums.of_json(sums)}}
        with self._storage_errors("write"):
            self._manager.write(step, arrays, data_iterator, documents, metrics)

    def restore(
        self, state: TrainState, data_iterator: Any, config: ConfigDict, defaults: Mapping[str, Any] | None = None
    ) -> TrainState:
        """Reads the latest checkpoint that is whole; damaged ones after it are moved aside.

        With several hosts all of them take the same one.

        Args:
          state: abstract state with shardings; they may be other than those it was written with.
          data_iterator: its state is set, so that it delivers next what it would have delivered.
          config: the configuration given; must describe the stored model.
          defaults: values of the keys that a stored configuration may lack; see `check_same_model`.

        Returns:
          The train state.

        Raises:
          ConfigMismatch: the checkpoint holds another model.
          CheckpointError: there is none, or none that can be read.
        """

        def read(step: int) -> tuple[dict[str, PyTree], bytes]:
            with self._same_on_all_hosts(step):
                stored, wanted = StoredCheckpoint(self.directory / str(step)), _items(state)
                check_same_model(stored.config(), to_json(config), str(self.directory), defaults)
                stored.check_shapes(wanted)
                items = {item: stored.arrays(item, tree) for item, tree in wanted.items()}
                place = stored.place_in_data()
            stored.check_sums(items)
            return items, place

        items, place = self._whole(None, read)
        DataState(data_iterator).set_state(place)
        self._move_damaged_aside()
        return state.replace(params=items["params"], ema=items.get("ema"), **items["rest"])

    def restore_params(
        self, step: int | str | None = None, *, ema: bool = True, layout: Callable[[PyTree], PyTree] | None = None
    ) -> PyTree:
        """Reads parameters alone, for generation.

        Args:
          step: which checkpoint: None for the latest that is whole, "best", or a number.
          ema: the average where one is stored, else (and where none is) the parameters themselves.
          layout: from what is stored, a tree of values with shape and dtype, to where each array goes, a tree of
            shardings (default: all on the first device).

        Returns:
          Nested dict of float32 arrays, as the task's `init` made it.

        Raises:
          CheckpointError: there is no such checkpoint, or it is damaged.
        """
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        layout = layout or (lambda stored: jax.tree.map(lambda _: first_device, stored))

        def read(step: int) -> PyTree:
            stored = StoredCheckpoint(self.directory / str(step))
            item = "ema" if ema and stored.has("ema") else "params"
            shapes = stored.abstract(item)
            items = {item: stored.arrays(item, abstract(shapes, layout(shapes)))}
            stored.check_sums(items)
            return items[item]

        return self._whole(step, read)

    def config(self, step: int | str | None = None) -> dict[str, Any]:
        """The configuration stored with a checkpoint (None: the latest that is whole), as plain JSON values."""
        return self._whole(step, lambda number: StoredCheckpoint(self.directory / str(number)).config())

    def reached_preemption(self, step: int) -> bool:
        """Whether, on any host, the cluster asked the job to stop; true at the same step on all hosts.

        To be called at every step on every host.  Always false where `jax.distributed` is not in use.
        """
        return self._manager.asked_to_stop(step)

    def wait(self) -> None:
        """Blocks until everything is on disk.

        Raises:
          CheckpointError: the last checkpoint could not be written.
        """
        with self._storage_errors("write"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of threads and files."""
        with self._storage_errors("write"):
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resolve(self, step: int | str | None) -> int:
        """The number of a checkpoint that is there: None is the latest; "best"; or that number.

        Raises:
          CheckpointError: there is no such checkpoint.
        """
        found = self.steps
        if not found:
            raise CheckpointError(
                f"No checkpoint in {self.directory}: expected the workdir of a training run. "
                "Train first, or check the path."
            )
        if step is None:
            return found[-1]
        if step == "best":
            return self.best_step if self.best_step is not None else found[-1]
        if step not in found:
            raise CheckpointError(f"No checkpoint of step {step} in {self.directory}; there are {found}, or 'best'.")
        return int(step)

    def _check_space(self, state: TrainState) -> None:
        """Refuses to begin what cannot fit: cheaper and clearer than an error from the middle of it."""
        if is_remote(self.directory):
            return
        arrays = jax.tree.leaves(state)
        here = sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards if shard.replica_id == 0)
        needed = here + (len(arrays) << 12) + (1 << 20)  # each array is a file; metadata and configuration beside them
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise CheckpointError(
                f"Cannot write checkpoints in {self.directory}: no space left on the device (a checkpoint needs "
                f"{needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free). {_INTACT}"
            )

    def _whole(self, step: int | str | None, read: Callable[[int], T]) -> T:
        """What `read` makes of the checkpoint asked for; for None of the latest one that it finds whole."""
        self.wait()
        reasons = {}
        for number in [self.resolve(step)] if step is not None else self.steps[::-1] or [self.resolve(None)]:
            with self._storage_errors("read"):
                try:
                    return read(number)
                except Damaged as damage:
                    reasons[number] = str(damage)
            if step is None:
                self._damaged.add(number)
                logging.warning(
                    "The checkpoint %s is damaged (%s): passed over.", self.directory / str(number), reasons[number]
                )
        raise CheckpointError(
            f"No checkpoint in {self.directory} can be read into this model: "
            f"{'; '.join(f'step {number}: {reason}' for number, reason in reasons.items())}. Damaged, or written by "
            f"another version. {'Ask for another step' if step is not None else 'Delete them to start afresh'}, or "
            "give another --workdir."
        )

    @contextmanager
    def _same_on_all_hosts(self, step: int) -> Iterator[None]:
        """What fails inside on one host fails on all of them; what only one of them finds damaged is so for all."""
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        if jax.process_count() > 1:
            mine = 0 if error is None else 1 if isinstance(error, Damaged) else 2
            worst = int(np.max(multihost_utils.process_allgather(np.int32(mine))))
            if mine < worst:
                where = self.directory / str(step)
                error = (
                    Damaged("on another host") if worst == 1 else CheckpointError(f"Another host: cannot read {where}.")
                )
        if error is not None:
            raise error

    def _move_damaged_aside(self) -> None:
        """Renames what was passed over, so that a checkpoint of that step can be written again."""
        if not self._damaged:
            return
        with self._storage_errors("rename"):
            if jax.process_index() == 0:
                for step in self._damaged:
                    aside = self.directory / f"{step}.damaged"
                    if aside.exists():
                        aside.rmtree()
                    (self.directory / str(step)).rename(aside)
                    logging.warning("It is kept as %s; delete it when you like.", aside)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are aside")
            self._manager.reload()
            self._damaged.clear()

    @contextmanager
    def _storage_errors(self, action: str) -> Iterator[None]:
        """Turns what storage raises, however deep it lies in the chain, into one `CheckpointError`."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            cause = storage_cause(error)
            if cause is None:
                raise
            raise CheckpointError(f"Cannot {action} checkpoints in {self.directory}: {cause}. {_INTACT}") from error


def _items(state: TrainState) -> dict[str, PyTree]:
    """The state as the items of a checkpoint: parameters, average, and all that remains."""
    names = ("step", "opt_state", "skipped", "skipped_in_row")
    items = {"params": state.params, "rest": {name: getattr(state, name) for name in names}}
    return items if state.ema is None else {**items, "ema": state.ema}
