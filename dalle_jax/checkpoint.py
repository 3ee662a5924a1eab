"""Checkpoints of a run: parameters, their average, the rest of the train state, the data iterator, the configuration.

    <workdir>/checkpoints/<step>/{params,ema,rest,data,config}

Parameters and average are items of their own, so that generation reads one of them and nothing else.  Writing is
asynchronous and atomic (orbax writes to a temporary folder and renames it), so that a crash or a full disk never
damages what is there.  A checkpoint can be read onto another mesh and by another number of hosts.

Orbax stays behind this module.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from dalle_jax.compatibility import check_same_model, to_json
from dalle_jax.errors import CheckpointError, UserError
from dalle_jax.train_step import TrainState

PyTree = Any

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
        self.directory = epath.Path(workdir).expanduser().absolute() / "checkpoints"

        def best(metrics: Mapping[str, float]) -> float:
            value = metrics.get(best_metric, math.nan)
            return math.inf if math.isnan(value) else value

        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(max(keep_last, 1)),
                policies.BestN(n=keep_best, get_metric_fn=best, reverse=True, keep_checkpoints_without_metrics=False),
            ]
        )
        with self._storage_errors("open"):
            self._manager = ocp.CheckpointManager(
                self.directory,
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
                },
            )

    @property
    def latest_step(self) -> int | None:
        """Step of the latest checkpoint, None where there is none."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """Step of the checkpoint with the lowest best metric; the latest where none has been measured."""
        return self._manager.best_step()

    @property
    def steps(self) -> list[int]:
        """Steps of all checkpoints kept, rising."""
        return sorted(self._manager.all_steps())

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
        items = {
            "params": ocp.args.StandardSave(state.params),
            "rest": ocp.args.StandardSave(_rest(state)),
            "data": grain.checkpoint.CheckpointSave(_DataState(data_iterator)),
            "config": ocp.args.JsonSave(to_json(config)),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        with self._storage_errors("write"):
            numbers = None if metrics is None else {name: float(value) for name, value in metrics.items()}
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=numbers, force=True)

    def restore(self, state: TrainState, data_iterator: Any, config: ConfigDict) -> TrainState:
        """Reads the latest checkpoint.

        Args:
          state: abstract state with shardings; they may be other than those it was written with.
          data_iterator: its state is set, so that it delivers next what it would have delivered.
          config: the configuration given; must describe the stored model.

        Returns:
          The train state.

        Raises:
          ConfigMismatch: the checkpoint holds another model.
          CheckpointError: there is none, or it cannot be read.
        """
        step = self.resolve(None)
        check_same_model(self.config(step), to_json(config), str(self.directory))
        items = {
            "params": ocp.args.StandardRestore(state.params),
            "rest": ocp.args.StandardRestore(_rest(state)),
        }
        if state.ema is not None:
            items["ema"] = ocp.args.StandardRestore(state.ema)
        with self._reading(step):
            self._check_shapes(step, state.params)
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
            self._restore_data(step, data_iterator)
        return state.replace(params=restored["params"], ema=restored.get("ema"), **restored["rest"])

    def restore_params(
        self, step: int | str | None = None, *, ema: bool = True, sharding: jax.sharding.Sharding | None = None
    ) -> PyTree:
        """Reads parameters alone, for generation.

        Args:
          step: which checkpoint: None for the latest, "best", or a number.
          ema: the average where one is stored, else (and where none is) the parameters themselves.
          sharding: where to put every array (default: the first device).

        Returns:
          Nested dict of float32 arrays, as the task's `init` made it.

        Raises:
          CheckpointError: there is no such checkpoint.
        """
        step = self.resolve(step)
        with self._storage_errors("read"):
            stored = self._manager.item_metadata(step)
            item = "ema" if ema and stored.get("ema") is not None else "params"
            sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), stored[item].tree
            )
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
            )
        return restored[item]

    def config(self, step: int | str | None = None) -> dict[str, Any]:
        """The configuration stored with a checkpoint, as plain JSON values."""
        step = self.resolve(step)
        with self._storage_errors("read"):
            return self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))["config"]

    def reached_preemption(self, step: int) -> bool:
        """Whether, on any host, the cluster asked the job to stop; true at the same step on all hosts.

        To be called at every step on every host.  Always false where `jax.distributed` is not in use.
        """
        return self._manager.reached_preemption(step)

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
        if "://" in str(self.directory):
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

    def _check_shapes(self, step: int, params: PyTree) -> None:
        """Names the first parameter that the checkpoint and the model do not share."""

        def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

        stored = self._manager.item_metadata(step)["params"]
        if stored is None:
            raise ValueError("it has no parameters")
        old, new = shapes(stored.tree), shapes(params)
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                raise ValueError(f"parameter {name} is {old.get(name)} there, {new.get(name)} here")

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        with self._storage_errors("read"):
            try:
                yield
            except (ValueError, KeyError, FileNotFoundError) as error:
                if isinstance(error, UserError):
                    raise
                raise CheckpointError(
                    f"The checkpoint {self.directory / str(step)} cannot be read into this model: "
                    f"{' '.join(str(error).split())[:200]}. It "
                    "is damaged or was written by another version; delete it to go on from the one before, or give "
                    "another --workdir."
                ) from error

    def _restore_data(self, step: int, data_iterator: Any) -> None:
        folder = self.directory / str(step) / "data"
        path = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
        if not path.exists():  # another number of hosts: every host counts the same global batches
            path = min(folder.glob("process_*.json"))
        _DataState(data_iterator).set_state(path.read_text().encode())

    @contextmanager
    def _storage_errors(self, action: str) -> Iterator[None]:
        """Turns what storage raises, however deep it lies in the chain, into one `CheckpointError`."""
        try:
            yield
        except CheckpointError:
            raise
        except Exception as error:
            cause = _storage_cause(error)
            if cause is None:
                raise
            raise CheckpointError(f"Cannot {action} checkpoints in {self.directory}: {cause}. {_INTACT}") from error


def _not_from_orbax(record: Any) -> bool:
    """Drops what orbax logs: dozens of lines for each save, and every error that it also raises."""
    return "/orbax/" not in record.pathname.replace("\\", "/")


logging.get_absl_logger().addFilter(_not_from_orbax)


def _rest(state: TrainState) -> dict[str, PyTree]:
    """All of the state but parameters and average."""
    names = ("step", "opt_state", "skipped", "skipped_in_row")
    return {name: getattr(state, name) for name in names}


def _storage_cause(error: BaseException | None) -> str | None:
    """What is wrong with the storage, None where the error is about something else."""
    texts = {
        "No space left on device": "no space left on the device",
        "RESOURCE_EXHAUSTED": "no space left on the device",
        "Disk quota exceeded": "disk quota exceeded",
        "File too large": "file too large for this file system or its limits",
        "Permission denied": "permission denied",
        "Read-only file system": "read-only file system",
    }
    while error is not None:
        if isinstance(error, OSError) and error.errno in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EFBIG,
            errno.EACCES,
            errno.EROFS,
        ):
            return (error.strerror or str(error)).lower()
        for text, meaning in texts.items():
            if text.lower() in str(error).lower():
                return meaning
        error = error.__cause__ or error.__context__
    return None


class _DataState:
    """Gives any iterator whose state is bytes or a JSON value the interface that grain's checkpoint handler expects."""

    def __init__(self, iterator: Any):
        self._iterator = iterator

    def get_state(self) -> bytes:
        state = self._iterator.get_state()
        return json.dumps({"bytes": state.decode()} if isinstance(state, bytes) else {"json": state}).encode()

    def set_state(self, state: bytes) -> None:
        ((kind, value),) = json.loads(state).items()
        self._iterator.set_state(value.encode() if kind == "bytes" else value)
