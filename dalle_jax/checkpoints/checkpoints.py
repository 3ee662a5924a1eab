"""Checkpoints of a run: named trees of arrays, the place in the data, and the configuration.

    <workdir>/checkpoints/<step>/{params,ema,rest,data,config,checksums}

The parameters and their moving average are separate items, so that generation reads one of them and nothing else.
Writing is asynchronous and atomic. Orbax writes to a temporary folder and renames it. On object storage, it writes a
mark when everything else is there. A crash or a full disk therefore never damages existing checkpoints. Another
number of hosts, with another mesh, can read a checkpoint.

Damage that happens later (truncated, lost or changed files) is found on reading. A warning then names the checkpoint,
and the one before it is used. A training renames the damaged one to `<step>.damaged` and continues.

Only this module and its parts `manager` and `stored` use orbax.
"""

from __future__ import annotations

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
from dalle_jax.checkpoints.manager import INTACT, Manager, check_space
from dalle_jax.checkpoints.stored import Damaged, DataIterator, StoredCheckpoint, move_to
from dalle_jax.distributed.sharding import abstract
from dalle_jax.errors import CheckpointError, DamagedError
from dalle_jax.pytree import PyTree
from dalle_jax.storage.errors import storage_cause
from dalle_jax.storage.files import full_path

T = TypeVar("T")


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
          workdir: local or remote ("gs://...").
          keep_last: number of latest checkpoints to keep.
          keep_best: number of best checkpoints to keep in addition.
          best_metric: the metric given to `save` that defines the best checkpoint: "mse" if lower values are better,
            "+psnr" if higher values are.
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
        """Step of the latest checkpoint that is not known to be damaged, or None."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """Step with the best metric among `steps`, or None. Without a best metric, the latest step."""
        return next(iter(self._from_best()), None)

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints in rising order, without those that were found damaged."""
        return sorted({*self._manager.all_steps()} - self._damaged)

    def save(
        self,
        step: int,
        items: Mapping[str, PyTree],
        data_iterator: DataIterator,
        config: ConfigDict,
        metrics: Mapping[str, float] | None = None,
        frozen: str | None = None,
    ) -> None:
        """Starts to write a checkpoint and returns when the arrays may be overwritten.

        Args:
          step: number of steps done. An existing checkpoint of this step is left as it is.
          items: trees of arrays named "params", "rest" and, if an average is kept, "ema".
          data_iterator: the training iterator after `step` batches. Its state is read now.
          config: the configuration of the run.
          metrics: evaluation at this very step, or None.
          frozen: fingerprint of the frozen modules that the parameters are trained with, or None.

        Raises:
          CheckpointError: this checkpoint or the previous one could not be written (a full disk).
        """
        if step in self._manager.all_steps():
            return
        check_space(self.directory, items)
        given = to_json(config)
        numbers = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        sums = {
            "arrays": {item: checksums.of_arrays(tree) for item, tree in items.items()},
            "config": checksums.of_json(given),
            "metrics": checksums.of_json(numbers),
            "step": step,
            "frozen": frozen,
        }
        documents = {"config": given, "checksums": {**sums, "these": checksums.of_json(sums)}}
        with self._storage_errors("write"):
            self._manager.write(step, items, data_iterator, documents, numbers)

    def restore(
        self,
        items: Mapping[str, PyTree],
        data_iterator: DataIterator,
        config: ConfigDict,
        defaults: Mapping[str, Any] | None = None,
        frozen: str | None = None,
    ) -> dict[str, PyTree]:
        """Reads the latest intact checkpoint and moves damaged ones after it aside.

        All hosts of a run read the same checkpoint.

        Args:
          items: abstract items with shardings, which may differ from those at writing.
          data_iterator: its state is set, so that the next batch is the one after the checkpoint.
          config: the given configuration. It must describe the stored model.
          defaults: values of the keys that a stored configuration may lack; see `check_same_model`.
          frozen: fingerprint of the frozen modules of this run, or None.

        Returns:
          The items, with arrays.

        Raises:
          ConfigMismatch: the checkpoint holds another model.
          CheckpointError: there is no checkpoint, none is readable, or it was trained with other frozen modules.
        """

        def read(step: int) -> tuple[dict[str, PyTree], bytes]:
            with self._same_on_all_hosts(step):
                stored = StoredCheckpoint(self.directory / str(step))
                check_same_model(stored.config(), to_json(config), str(self.directory), defaults)
                stored.check_frozen(frozen)
                stored.check_shapes(items)
                arrays = {item: stored.arrays(item, tree) for item, tree in items.items()}
                place = stored.place_in_data()
            stored.check_sums(arrays)
            return arrays, place

        arrays, place = self._first_intact(None, read)
        move_to(data_iterator, place)
        self._move_damaged_aside()
        return arrays

    def restore_params(
        self,
        step: int | str | None = None,
        *,
        ema: bool = True,
        layout: Callable[[PyTree], PyTree] | None = None,
        frozen: str | None = None,
    ) -> PyTree:
        """Reads the parameters alone, for generation.

        Args:
          step: None for the latest intact checkpoint, "best" for the best intact one, or a number.
          ema: read the moving average if it is stored. Otherwise the parameters are read.
          layout: maps the stored tree of shapes and dtypes to a tree of shardings. The default puts all arrays on the
            first device.
          frozen: fingerprint of the frozen modules that the parameters are used with, or None.

        Returns:
          Nested dict of float32 arrays, with the structure of the task's `init`.

        Raises:
          CheckpointError: there is no such checkpoint, it is damaged, or it was trained with other frozen modules.
        """
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        layout = layout or (lambda stored: jax.tree.map(lambda _: first_device, stored))

        def read(step: int) -> PyTree:
            stored = StoredCheckpoint(self.directory / str(step))
            stored.check_frozen(frozen)
            item = "ema" if ema and stored.has("ema") else "params"
            shapes = stored.abstract(item)
            items = {item: stored.arrays(item, abstract(shapes, layout(shapes)))}
            stored.check_sums(items)
            return items[item]

        return self._first_intact(step, read)

    def config(self, step: int | str | None = None) -> dict[str, Any]:
        """Reads the stored configuration of a checkpoint as JSON values. For `step` see `restore_params`."""
        return self._first_intact(step, lambda number: StoredCheckpoint(self.directory / str(number)).config())

    def metrics(self, step: int) -> Mapping[str, float] | None:
        """Reads the evaluation of a checkpoint; None if there was none, or if it is damaged."""
        return self._manager.metrics(step)

    def reached_preemption(self, step: int) -> bool:
        """Returns whether the cluster asked any host to stop; true at the same step on all hosts.

        Call it at every step on every host. Without `jax.distributed` it is always false.
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
        """Waits for pending writes and releases threads and files."""
        with self._storage_errors("write"):
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resolve(self, step: int | str | None) -> int:
        """Returns the number of an existing checkpoint.

        Args:
          step: None for the latest, "best" for the best, or a number. Checkpoints known to be damaged do not count.

        Raises:
          CheckpointError: there is no such checkpoint.
        """
        return self._candidates(step)[0]

    def _candidates(self, step: int | str | None) -> list[int]:
        """Lists the steps that `step` may stand for: first choice first, at least one."""
        found = self.steps
        if not found:
            raise CheckpointError(
                f"No checkpoint in {self.directory}: expected the workdir of a training run. "
                "Train first, or check the path."
            )
        if step is None:
            return found[::-1]
        if step == "best":
            return self._from_best()
        if isinstance(step, str) and step.isdecimal():
            step = int(step)
        if step not in found:
            raise CheckpointError(f"No checkpoint of step {step} in {self.directory}; there are {found}, or 'best'.")
        return [int(step)]

    def _from_best(self) -> list[int]:
        """Lists `steps` from the best to the worst, then those without metrics from the latest to the first."""
        self.wait()
        steps = self.steps
        ranked = [step for step in self._manager.ranked_steps() if step in steps]
        return ranked + [step for step in reversed(steps) if step not in ranked]

    def _first_intact(self, step: int | str | None, read: Callable[[int], T]) -> T:
        """Returns `read(number)` of the first candidate for `step` that is not damaged."""
        self.wait()
        reasons, chosen = {}, step is not None and step != "best"
        for number in self._candidates(step):
            with self._storage_errors("read"):
                try:
                    return read(number)
                except Damaged as damage:
                    reasons[number] = str(damage)
            if not chosen:
                self._damaged.add(number)
                logging.warning(
                    "The checkpoint %s is damaged (%s): skipped.", self.directory / str(number), reasons[number]
                )
        listed = "; ".join(f"step {number}: {reason}" for number, reason in reasons.items())
        remedy = "Ask for another step" if chosen else "Delete them to start from scratch"
        raise DamagedError(
            f"No checkpoint in {self.directory} can be read into this model: {listed}. They are damaged, or another "
            f"version wrote them. {remedy}, or give another --workdir."
        )

    @contextmanager
    def _same_on_all_hosts(self, step: int) -> Iterator[None]:
        """Raises on every host if any host fails inside the block; damage on one host is damage on all."""
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
                    Damaged("on another host") if worst == 1 else CheckpointError(f"Another host cannot read {where}.")
                )
        if error is not None:
            raise error

    def _move_damaged_aside(self) -> None:
        """Renames damaged checkpoints, so that a checkpoint of that step can be written again."""
        if not self._damaged:
            return
        with self._storage_errors("rename"):
            if jax.process_index() == 0:
                for step in self._damaged:
                    aside = self.directory / f"{step}.damaged"
                    if aside.exists():
                        aside.rmtree()
                    (self.directory / str(step)).rename(aside)
                    logging.warning("It is kept as %s; you may delete it.", aside)
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("damaged checkpoints are aside")
            self._manager.reload()
            self._damaged.clear()

    @contextmanager
    def _storage_errors(self, action: str) -> Iterator[None]:
        """Converts storage errors, however deep in the chain of causes, into one `CheckpointError`."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            cause = storage_cause(error)
            if cause is None:
                raise
            raise CheckpointError(f"Cannot {action} checkpoints in {self.directory}: {cause}. {INTACT}") from error
