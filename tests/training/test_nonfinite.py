"""Tests of updates that are not finite: no checkpoint is written among them, and the end names a good one."""

import dataclasses
import math
import os
import re
import shutil
import signal

import jax
import numpy as np
import pytest
from etils import epath
from tiny_job import tiny_config, tiny_job

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.errors import NonFiniteError, Preempted
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.training import nonfinite
from dalle_jax.training.loop import train


def job_with_poisoned_batches(config, numbers):
    """A job whose batches of these numbers, from 0 on, hold NaN."""
    job = tiny_job(config)
    batches = job.train_batches

    class Poisoned:
        def __init__(self):
            self._batches, self._next = batches(), 0
            self.get_state = lambda: {"batches": self._batches.get_state(), "next": self._next}

        def set_state(self, state):
            self._batches.set_state(state["batches"])
            self._next = state["next"]

        def __next__(self):
            batch = next(self._batches)
            if self._next in numbers:
                batch = {**batch, "x": np.full_like(batch["x"], np.nan)}
            self._next += 1
            return batch

    return dataclasses.replace(job, train_batches=Poisoned)


def run(workdir, poisoned=(), **changes):
    config = tiny_config(**changes)
    return train(config, str(workdir), job_with_poisoned_batches(config, poisoned))


def stored(workdir):
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        return checkpoints.steps


def series(workdir, name):
    return {line["step"]: line[name] for line in read_metrics(str(workdir)) if name in line}


@pytest.mark.parametrize("keep_best", [0, 1])
def test_a_poisoned_batch_at_a_checkpoint(tmp_path, keep_best):
    """Evaluation and checkpoint, due at step 5, take place after the next good update."""
    state = run(tmp_path, poisoned=(4, 5), keep__best=keep_best)
    assert stored(tmp_path) == [7, 10] and list(series(tmp_path, "eval/error")) == [7, 10]
    assert series(tmp_path, "train/skipped")[10] == 2 and int(state.skipped_in_row) == 0


def test_every_checkpoint_is_outside(tmp_path, monkeypatch):
    """With a checkpoint and an evaluation after each step, none of them falls among skipped updates."""
    saved = {}

    def save(self, step, items, *_):
        saved[step] = int(items["rest"]["skipped_in_row"])

    monkeypatch.setattr(Checkpoints, "save", save)
    run(tmp_path, poisoned=(1, 3, 4, 8), cadence__checkpoint=1, cadence__eval=1)
    assert saved == dict.fromkeys((1, 3, 6, 7, 8, 10), 0)


def test_the_end_names_a_checkpoint_from_before(tmp_path):
    """Resuming from the named checkpoint with good data reaches the end of a run that saw no poison."""
    changes = {"cadence__checkpoint": 3, "keep__last": 1, "steps": 9}
    with pytest.raises(NonFiniteError, match="steps 5 to 7.*step 3"):
        run(tmp_path / "poisoned", poisoned=range(4, 9), **changes)
    assert stored(tmp_path / "poisoned") == [3]
    state, expected = (run(tmp_path / name, **changes) for name in ("poisoned", "good"))
    jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)


def test_parameters_that_no_step_size_repairs(tmp_path):
    """An update destroys the parameters and is saved. The error names that checkpoint, and the one before it."""
    changes = {"cadence__checkpoint": 1, "keep__last": 2, "keep__best": 0}
    run(tmp_path, steps=2, **changes)
    for value in (1e30, 3e-2):
        with pytest.raises(NonFiniteError, match=r"steps 4 to 6.*checkpoints/3 .*step 2") as raised:
            run(tmp_path, schedules__learning_rate__value=value, **changes)
        assert stored(tmp_path) == [2, 3]
    shutil.rmtree(re.search(r"delete (\S+) ", str(raised.value))[1])
    assert int(run(tmp_path, **changes).step) == 10


def test_the_last_step(tmp_path):
    """A bad batch at the end costs nothing. If the evaluation is no number either, nothing is saved."""
    run(tmp_path / "batch", poisoned=(8, 9))
    assert stored(tmp_path / "batch") == [5, 10]
    config = tiny_config()
    job = job_with_poisoned_batches(config, (8, 9))
    evaluate = job.task.evaluate
    job.task.evaluate = lambda *given: {"error": evaluate(*given)["error"] if not job.task.evaluations else math.nan}
    with pytest.raises(NonFiniteError, match="steps 9 to 10.*step 5"):
        train(config, str(tmp_path / "parameters"), job)
    assert stored(tmp_path / "parameters") == [5]


@pytest.mark.parametrize("log, latest", [(1, 8), (100, 9)])
def test_a_run_ends_within_the_window(tmp_path, log, latest):
    """Scalars that wait for the log are fetched after `max_nonfinite` steps: the end comes at most that much later."""
    config = tiny_config(steps=50, cadence__log=log, cadence__checkpoint=100, cadence__eval=100, max_nonfinite=3)
    job = job_with_poisoned_batches(config, range(4, 50))
    read = []

    class Counted:
        def __init__(self):
            self._batches = job.train_batches()
            self.get_state = self._batches.get_state

        def __next__(self):
            read.append(1)
            return next(self._batches)

    with pytest.raises(NonFiniteError, match="steps 5 to 7"):
        train(config, str(tmp_path), dataclasses.replace(job, train_batches=Counted))
    assert len(read) - 2 <= latest + 1  # two batches wait on the devices, and one step was queued ahead


def test_a_signal_among_skipped_updates(uninterrupted_by_poison, tmp_path):
    """Nothing is saved, the message says from where the run resumes, and it reaches the same end."""
    workdir, state = uninterrupted_by_poison
    config = tiny_config()
    job = job_with_poisoned_batches(config, (6, 7))
    counts = iter(range(7, 0, -1))

    def data_counts():
        if next(counts, 0) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(Preempted) as stopped:
        train(config, str(tmp_path), dataclasses.replace(job, data_counts=data_counts))
    assert "step 5" in stopped.value.message and "saved" not in stopped.value.message
    assert stored(tmp_path) == [5]
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path, poisoned=(6, 7)).params, state.params)
    assert series(tmp_path, "train/skipped") == series(workdir, "train/skipped")


@pytest.fixture(scope="module")
def uninterrupted_by_poison(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir, poisoned=(6, 7))


@pytest.mark.parametrize(
    "checkpoints, words",
    [
        ([], "No checkpoint"),
        ([5], "step 5 is older"),
        ([5, 6], "6 holds .*checkpoints/6 to resume from step 5"),
        ([5, 6, 8], "8 holds .*checkpoints/6 and .*checkpoints/8 to resume from step 5"),
        ([6], "6 holds .*--workdir"),
    ],
)
def test_where_to_go_back_to(checkpoints, words):
    """Steps 7 to 9 were skipped: checkpoints from step 6 on hold the same parameters."""
    directory = epath.Path("runs/a/checkpoints")
    assert re.search(f"7 to 9.*{words}.*lower optimizer", str(nonfinite.error(9, 3, checkpoints, directory, 1.0)))
    assert "clip_norm=1" in str(nonfinite.error(9, 3, checkpoints, directory, 0.0))
