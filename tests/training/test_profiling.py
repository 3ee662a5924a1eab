"""Tests of profiling: the parts of a step's time, the trace of a few steps, the cache of compiled programs."""

import dataclasses
import gzip
import json
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import jax
import pytest
from jax.profiler import ProfileData
from tiny_job import tiny_batches, tiny_config, tiny_job

from dalle_jax import compilation_cache
from dalle_jax.errors import ConfigError
from dalle_jax.reporting import progress, tensorboard
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.training import profiling
from dalle_jax.training.loop import train
from dalle_jax.training.profiling import StepTrace
from dalle_jax.training.step import Scalars

DATA, DEVICE, LOGGING, EVALUATION = 3.0, 5.0, 0.5, 100.0


class SlowBatches:
    """The tiny job's batches, each of which advances the clock."""

    def __init__(self, passes):
        self._batches, self._passes = tiny_batches(16), passes

    def __next__(self):
        self._passes(DATA)
        return next(self._batches)

    def __getattr__(self, name):
        return getattr(self._batches, name)


@pytest.fixture
def timed(monkeypatch, tmp_path, capsys):
    """Metrics and output of a run whose clock advances in four places only."""
    now = [0.0]

    def passes(seconds):
        now[0] += seconds

    clock = types.SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0], time=lambda: now[0])
    monkeypatch.setattr(profiling, "time", clock)
    monkeypatch.setattr(tensorboard, "time", clock)
    monkeypatch.setattr(progress, "time", clock)

    monkeypatch.setattr(Scalars, "wait", lambda _: passes(DEVICE))
    config = tiny_config(steps=4, cadence__log=2, cadence__eval=2, cadence__checkpoint=0)
    job = tiny_job(config)

    def data_counts():
        passes(LOGGING)
        return {}

    def evaluate(*_):
        passes(EVALUATION)
        return {"error": 1.0}

    job.task.evaluate = evaluate
    train(
        config,
        str(tmp_path),
        dataclasses.replace(job, train_batches=lambda: SlowBatches(passes), data_counts=data_counts),
    )
    return [line for line in read_metrics(str(tmp_path)) if "train/loss" in line], capsys.readouterr().out


def test_the_parts_of_a_steps_time(timed):
    """The parts equal the simulated times and add up to the whole; evaluation is not part of it."""
    lines, printed = timed
    assert [line["step"] for line in lines] == [2, 4]
    parts = [{name: line[f"train/seconds_{name}"] for name in ("data", "dispatch", "device")} for line in lines]
    ahead = 2 * DATA  # the first step also waits for the two batches that are prefetched
    assert parts[0] == pytest.approx({"data": DATA + ahead / 2, "dispatch": 0, "device": DEVICE})
    assert parts[1] == pytest.approx({"data": DATA, "dispatch": 0, "device": DEVICE})
    for line in lines:
        names = ("data", "dispatch", "device", "other")
        assert sum(line[f"train/seconds_{name}"] for name in names) == pytest.approx(line["train/seconds_per_step"])
    assert lines[1]["train/seconds_other"] == pytest.approx(LOGGING / 2)
    assert "train/seconds_compile" in lines[0] and "train/seconds_compile" not in lines[1]
    assert "(data 46%, dispatch 0%, device 51%)" in printed


# -- traces -------------------------------------------------------------------------------------------------------


def test_a_trace_of_three_steps(tmp_path):
    """TensorBoard's and Perfetto's files show numbered steps, their parts, an evaluation and a checkpoint."""
    config = tiny_config(profile_steps=3)
    train(config, str(tmp_path), tiny_job(config))
    (folder,) = (tmp_path / "profile" / "plugins" / "profile").iterdir()
    (planes,) = folder.glob("*.xplane.pb")
    profile = ProfileData.from_file(str(planes))
    assert sum(1 for plane in profile.planes for line in plane.lines for _ in line.events) > 20
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        events = [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]
    steps = {int(event["args"]["step_num"]): event for event in events if event["name"] == "train"}
    assert sorted(steps) == [4, 5, 6]
    for step in steps.values():
        inside = [e["name"] for e in events if step["ts"] <= e["ts"] < step["ts"] + step["dur"]]
        assert [name for name in inside if name in ("data", "dispatch")] == ["data", "dispatch"]
    assert {"device", "evaluate", "checkpoint"} <= {event["name"] for event in events}


@pytest.mark.parametrize(
    "start, total, count, recorded",
    [(0, 10, 2, (3, 5)), (5, 10, 2, (8, 10)), (5, 10, 4, (6, 10)), (0, 3, 5, (0, 3)), (0, 10, 0, ()), (10, 10, 3, ())],
)
def test_which_steps_are_recorded(monkeypatch, tmp_path, start, total, count, recorded):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append(step))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(step))
    trace = StepTrace(tmp_path, start=start, total=total, count=count)
    for step in range(start, total + 1):
        if trace.due(step):
            trace.advance()
    trace.close()
    assert tuple(calls) == recorded


def test_an_interrupted_recording_is_written(tmp_path):
    trace = StepTrace(tmp_path, start=0, total=10, count=5)
    assert trace.due(3) and "steps 4 to 8" in trace.advance()
    trace.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    jax.profiler.start_trace(tmp_path / "other")  # possible because no recording is active
    jax.profiler.stop_trace()


# -- compiled programs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variables, kept_in",
    [
        ({}, "home/.cache/dalle_jax/xla"),
        ({"JAX_COMPILATION_CACHE_DIR": "elsewhere"}, "elsewhere"),
        ({"JAX_ENABLE_COMPILATION_CACHE": "false"}, None),
    ],
)
def test_compiled_programs_are_kept(tmp_path, variables, kept_in):
    """The cache also works in a process that has compiled before, such as a notebook's."""
    script = textwrap.dedent("""
        import jax
        from dalle_jax import compilation_cache
        jax.jit(lambda x: x + 1)(0)
        compilation_cache.enable()
        jax.jit(lambda x: x * 2)(0)
    """)
    left_out = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    root = pathlib.Path(__file__).parents[2]
    environment |= {"HOME": str(tmp_path / "home"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment |= {"PYTHONPATH": root, **variables}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, check=True)
    found = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == ({kept_in} if kept_in else set())


def test_a_training_enables_the_cache(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(compilation_cache, "enable", lambda: called.append(1))
    with pytest.raises(ConfigError, match="magic"):
        config = tiny_config(schedules__learning_rate__kind="magic")
        train(config, str(tmp_path), tiny_job(config))
    assert called
