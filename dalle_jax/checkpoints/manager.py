"""Orbax's manager of checkpoints, set up for the items of a run: which are kept, and how each one is written."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import grain
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from dalle_jax.checkpoints.stored import DataState
from dalle_jax.pytree import PyTree

_boundaries = itertools.count()  # between steps, over all trainings of this process


class Manager(ocp.CheckpointManager):
    """Orbax's, with the items of a run; measures which cannot be read count as never taken."""

    def __init__(self, directory: epath.Path, *, keep_last: int, keep_best: int, best_metric: str, read_only: bool):
        """Opens the folder; the arguments are those of `Checkpoints`."""

        self._stop_at: int | None = None

        def best(metrics: Mapping[str, float]) -> float:
            value = metrics.get(best_metric, math.nan)
            return math.inf if math.isnan(value) else value

        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(max(keep_last, 1)),
                policies.BestN(n=keep_best, get_metric_fn=best, reverse=True, keep_checkpoints_without_metrics=False),
            ]
        )
        super().__init__(
            directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=best if best_metric else None,
                best_mode="min",
                preservation_policy=keep,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
                save_interval_steps=0 if read_only else 1,
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
        data_iterator: Any,
        documents: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts to write a checkpoint.

        Args:
          step: its number.
          arrays: "params", "rest" and, where there is one, "ema": trees of arrays.
          data_iterator: its state is read now.
          documents: "config" and "checksums": JSON values.
          metrics: what was measured of it, or None.
        """
        items = {
            **{item: ocp.args.StandardSave(tree) for item, tree in arrays.items()},
            "data": grain.checkpoint.CheckpointSave(DataState(data_iterator)),
            **{item: ocp.args.JsonSave(value) for item, value in documents.items()},
        }
        numbers = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        self.save(step, args=ocp.args.Composite(**items), metrics=numbers, force=True)

    def asked_to_stop(self, step: int) -> bool:
        """Whether all hosts stop at `step`, because one of them was told to.  To be called once for each step.

        Orbax would ask JAX with `step`; but JAX wants numbers that rise, also from one training to the next: hosts that
        are told to stop in the last step of one agree on the first of the other.
        """
        if super().reached_preemption(next(_boundaries)):
            self._stop_at = step
        return self._stop_at == step

    def reached_preemption(self, step: int) -> bool:
        """What `asked_to_stop` has found: Orbax asks again, from its threads too, and JAX is asked once a step."""
        return self._stop_at == step

    def metrics(self, step: int) -> PyTree | None:
        """The measures of a checkpoint; None where there are none, or they are damaged."""
        try:
            return super().metrics(step)
        except ValueError:
            logging.warning("The measures of the checkpoint %s are damaged: left out.", self.directory / str(step))
            return None
