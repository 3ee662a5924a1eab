"""Orbax's checkpoint manager, configured for the items of a run: which checkpoints to keep and how to write one."""

from __future__ import annotations

import itertools
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dalle_jax.checkpoints.best import BestMetric
from dalle_jax.checkpoints.stored import Damaged, DataIterator, DataState, StoredCheckpoint
from dalle_jax.errors import CheckpointError
from dalle_jax.pytree import PyTree
from dalle_jax.storage import json_files
from dalle_jax.storage.files import is_remote
from dalle_jax.storage.names import LiteralPath

_ORBAX = pathlib.Path(ocp.__file__).parents[1]
_TIMES = "_CHECKPOINT_METADATA"
_boundaries = itertools.count()  # between steps, over all trainings of this process

INTACT = "Earlier checkpoints are intact. Free space or restore access, then run the same command again to resume."


class Manager(ocp.CheckpointManager):
    """Orbax's manager for the items of a run. Unreadable metrics count as missing."""

    def __init__(self, directory: epath.Path, *, keep_last: int, keep_best: int, best_metric: str, read_only: bool):
        """Opens the folder. The arguments are those of `Checkpoints`."""
        logging.get_absl_logger().addFilter(_is_not_from_orbax)  # notebooks have no other filter
        self._stop_at: int | None = None
        loss = BestMetric.parse(best_metric).loss
        self._loss = loss if best_metric else None
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(max(keep_last, 1)),
                policies.BestN(
                    n=keep_best,
                    get_metric_fn=loss,
                    reverse=True,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        if not is_remote(directory):
            directory = LiteralPath(directory)
            _check_times(directory)
        super().__init__(
            directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=self._loss,
                best_mode="min",
                preservation_policy=keep,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
                save_interval_steps=0 if read_only else 1,
                # In the background a failure would make the save wait 5 minutes for folders that never appear.
                async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            ),
            item_handlers={
                **{name: ocp.StandardCheckpointHandler() for name in ("params", "ema", "rest")},
                "data": grain.checkpoint.CheckpointHandler(),
                "config": ocp.JsonCheckpointHandler(),
                "checksums": ocp.JsonCheckpointHandler(),
            },
        )

    def write(
        self,
        step: int,
        arrays: Mapping[str, PyTree],
        data_iterator: DataIterator,
        documents: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts to write a checkpoint.

        Args:
          step: number of the checkpoint.
          arrays: trees of arrays "params", "rest" and optionally "ema".
          data_iterator: its state is read now.
          documents: JSON values "config" and "checksums".
          metrics: evaluation at this step, or None.
        """
        items = {
            **{item: ocp.args.StandardSave(tree) for item, tree in arrays.items()},
            "data": grain.checkpoint.CheckpointSave(DataState(data_iterator, step)),
            **{item: ocp.args.JsonSave(value) for item, value in documents.items()},
        }
        self.save(step, args=ocp.args.Composite(**items), metrics=metrics, force=True)

    def ranked_steps(self) -> list[int]:
        """Lists the steps with metrics from the best to the worst; of equals, the latest first."""
        if self._loss is None:
            return []
        found = {step: self.metrics(step) for step in self.all_steps()}
        losses = {step: self._loss(metrics) for step, metrics in found.items() if metrics is not None}
        return sorted(losses, key=lambda step: (losses[step], -step))

    def asked_to_stop(self, step: int) -> bool:
        """Returns whether all hosts stop at `step` because one of them got a signal. Call it once per step.

        Orbax would pass `step` to JAX.  JAX needs numbers that rise over all trainings of a process, because hosts that
        are asked to stop in the last step of one training would otherwise agree on the first step of the next.
        """
        if super().reached_preemption(next(_boundaries)):
            self._stop_at = step
        return self._stop_at == step

    def reached_preemption(self, step: int) -> bool:
        """Returns the last result of `asked_to_stop`, because orbax also calls this, from its threads too."""
        return self._stop_at == step

    def metrics(self, step: int) -> PyTree | None:
        """Returns the metrics of a checkpoint, or None if they are missing or damaged."""
        try:
            found = super().metrics(step)
            StoredCheckpoint(self.directory / str(step)).check_metrics(found)
            if found is not None and self._loss is not None:
                self._loss(found)
            return found
        except (ValueError, TypeError, AttributeError, RecursionError, Damaged):
            logging.warning("The metrics of the checkpoint %s are damaged: ignored.", self.directory / str(step))
            return None


def _check_times(directory: epath.Path) -> None:
    """Raises a `CheckpointError` for a damaged file of times, on which orbax would raise errors of many types."""
    for path in sorted(directory.glob(f"*/{_TIMES}")) if directory.exists() else ():
        remedy = "Delete this file: it holds nothing but the times at which the checkpoint was written."
        json_files.read(path, dict, CheckpointError, remedy)


def check_space(directory: epath.Path, items: Mapping[str, PyTree]) -> None:
    """Raises CheckpointError if the disk lacks space for a checkpoint, because an error in mid-write is less clear."""
    if is_remote(directory):
        return
    arrays = jax.tree.leaves(items)
    here = sum(shard.data.nbytes for x in arrays for shard in x.addressable_shards if shard.replica_id == 0)
    needed = here + (len(arrays) << 12) + (1 << 20)  # one file per array; metadata and configuration
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise CheckpointError(
            f"Cannot write checkpoints in {directory}: no space left on the device (a checkpoint needs "
            f"{needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free). {INTACT}"
        )


def _is_not_from_orbax(record: Any) -> bool:
    """Drops orbax's messages: dozens for each save, a warning for each read, and every error that it also raises."""
    return not pathlib.Path(record.pathname).is_relative_to(_ORBAX)
