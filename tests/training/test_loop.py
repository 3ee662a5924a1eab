"""Tests of the training loop: results do not depend on mesh, interruptions or batch slices; how a training stops."""

import dataclasses
import io
import json
import os
import signal
import sys
import textwrap
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import fill_disk, needs_full_device
from PIL import Image
from processes import finish, spawn
from tiny_job import tiny_config, tiny_job

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.workdir import read_config
from dalle_jax.errors import (
    CheckpointError,
    ConfigError,
    ConfigMismatch,
    DataError,
    MeshError,
    NonFiniteError,
    Preempted,
    UserError,
)
from dalle_jax.optim.optimizers import AverageOptions, update_average
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.training import run as run_module
from dalle_jax.training import step as train_step
from dalle_jax.training.loop import train
from dalle_jax.training.warm_start import warm_start


def run(workdir, *, noise=0.1, poison=(), **changes):
    config = tiny_config(**changes)
    return train(config, str(workdir), tiny_job(config, noise=noise, poison=poison))


def series(workdir, name):
    return {line["step"]: line[name] for line in read_metrics(str(workdir)) if name in line}


def assert_states_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A reference run of ten steps on one device."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, run(workdir)


def test_learns_and_writes_everything(uninterrupted):
    workdir, state = uninterrupted
    assert int(state.step) == 10 and state.eval_params is state.ema
    loss = series(workdir, "train/loss")
    assert list(loss) == list(range(1, 11)) and loss[10] < loss[1]
    names = {"gradient_norm", "learning_rate", "noise", "mean_x", "skipped", "examples_per_second", "seconds_per_step"}
    assert {f"train/{name}" for name in names} <= set(read_metrics(str(workdir))[0])
    assert series(workdir, "train/noise")[3] == pytest.approx(0.1 / 3)  # the schedule at the step that used it
    assert series(workdir, "train/left_out/unreadable")[10] == 2
    assert len(set(series(workdir, "train/drawn").values())) == 10  # every step has its own key
    assert list(series(workdir, "eval/error")) == [5, 10]
    assert series(workdir, "eval/batches")[10] == 2  # config.eval_batches, of three
    assert json.loads((workdir / "config.json").read_text())["model"] == {"hidden": 16, "remat": False}
    assert np.asarray(Image.open(workdir / "samples" / "preview_0000010.png")).shape == (4, 6, 3)
    assert list((workdir / "tensorboard").glob("events*"))


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 1, "fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_sharded_equals_unsharded(uninterrupted, tmp_path, mesh):
    workdir, state = uninterrupted
    sharded = run(tmp_path, **{f"mesh__{axis}": size for axis, size in mesh.items()})
    expected, got = series(workdir, "train/loss"), series(tmp_path, "train/loss")
    np.testing.assert_allclose(list(got.values()), list(expected.values()), atol=1e-5, rtol=0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), sharded.params, state.params)
    kernel = sharded.params["up"]["kernel"]
    ways = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    assert kernel.addressable_shards[0].data.size == kernel.size // ways
    assert sharded.opt_state[1].mu["up"]["kernel"].sharding == kernel.sharding


def test_resumed_equals_uninterrupted(uninterrupted, tmp_path):
    """Bit for bit, data order included, even if the run had logged steps after its last checkpoint."""
    workdir, state = uninterrupted
    run(tmp_path, steps=5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 7, "train/loss": -1.0}) + '\n{"step": 8, "train/l')
    resumed = run(tmp_path)
    assert_states_equal(resumed, state)
    for name in ("train/loss", "train/mean_x", "train/drawn", "eval/error"):
        assert series(tmp_path, name) == series(workdir, name)


def test_a_finished_run_is_not_changed(uninterrupted):
    workdir, state = uninterrupted
    before = (workdir / "metrics.jsonl").read_bytes()
    assert_states_equal(run(workdir), state)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_resumes_on_another_mesh(uninterrupted, tmp_path):
    workdir, _ = uninterrupted
    run(tmp_path, steps=5)
    run(tmp_path, mesh__data=2, mesh__fsdp=2, mesh__tensor=2)
    np.testing.assert_allclose(
        list(series(tmp_path, "train/loss").values()), list(series(workdir, "train/loss").values()), atol=1e-5, rtol=0
    )


def test_accumulation_equals_the_large_batch(tmp_path):
    whole = run(tmp_path / "1", noise=0.0, mesh__data=2)
    slices = run(tmp_path / "4", noise=0.0, mesh__data=2, optimizer__accumulate_steps=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), slices.params, whole.params)
    np.testing.assert_allclose(
        list(series(tmp_path / "4", "train/loss").values()),
        list(series(tmp_path / "1", "train/loss").values()),
        atol=1e-5,
    )


def test_without_average(tmp_path):
    state = run(tmp_path, steps=2, ema__decay=0.0)
    assert state.ema is None and state.eval_params is state.params
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(), state.params)


def test_updates_that_are_not_finite_are_skipped(tmp_path):
    before = run(tmp_path / "before", steps=3)
    after = run(tmp_path / "after", steps=5, poison=(3, 4))
    assert int(after.step) == 5 and int(after.skipped) == int(after.skipped_in_row) == 2
    for part in ("params", "ema", "opt_state"):
        assert_states_equal(getattr(after, part), getattr(before, part))
    assert series(tmp_path / "after", "train/loss")[4] is None
    assert series(tmp_path / "after", "train/skipped") == {1: 0, 2: 0, 3: 0, 4: 1, 5: 2}
    recovered = run(tmp_path / "recovered", steps=7, poison=(3, 4))
    assert int(recovered.skipped_in_row) == 0 and np.isfinite(series(tmp_path / "recovered", "train/loss")[7])


def test_stops_after_too_many_in_a_row(tmp_path):
    with pytest.raises(NonFiniteError, match="7 to 9.*step 5"):
        run(tmp_path, poison=(1, 2, 6, 7, 8, 9))
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        assert checkpoints.steps == [5]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(checkpoints.restore_params()))


@pytest.mark.parametrize("clip_norm, remedy", [(0.0, "clip_norm=1"), (0.5, "clip_norm=0.5")])
def test_remedies_for_values_that_are_not_finite(tmp_path, clip_norm, remedy):
    with pytest.raises(NonFiniteError, match=remedy):
        run(tmp_path, poison=(1, 2, 3, 4), optimizer__clip_norm=clip_norm)


def test_keeps_the_best(tmp_path):
    config = tiny_config(steps=8, cadence__eval=2, cadence__checkpoint=2, keep__last=1)
    job = tiny_job(config)
    errors = iter([3.0, 1.0, 2.0, 4.0])
    job.task.evaluate = lambda *_: {"error": next(errors)}
    train(config, str(tmp_path), job)
    with Checkpoints(str(tmp_path), best_metric="error", keep_best=1, read_only=True) as checkpoints:
        assert checkpoints.steps == [4, 8] and checkpoints.best_step == 4


def test_the_host_is_one_step_ahead(tmp_path, monkeypatch):
    """In the steady state the host waits for a step only after queueing the next one, and copies nothing else.

    It copies the scalars of several steps together, when they are logged.
    """
    events = []
    original = run_module.make_train_step

    def spied(*args):
        class Lowered:
            def lower(self, *arguments):
                compiled = original(*args).lower(*arguments).compile()

                def call(state, frozen, batch, key):
                    with jax.transfer_guard("disallow"):
                        state, scalars = compiled(state, frozen, batch, key)
                    events.append("queue")
                    return state, scalars

                call.memory_analysis = compiled.memory_analysis
                return type("Compiled", (), {"compile": lambda self: call})()

        return Lowered()

    def wait(scalars, until=train_step.Scalars.wait):
        events.append("wait")
        until(scalars)

    def fetch(steps, get=train_step.Scalars.fetch):
        events.append(len(steps))
        return get(steps)

    monkeypatch.setattr(run_module, "make_train_step", spied)
    monkeypatch.setattr(train_step.Scalars, "fetch", fetch)
    monkeypatch.setattr(train_step.Scalars, "wait", wait)
    changes = {"cadence__eval": 0, "cadence__checkpoint": 0, "cadence__log": 3, "max_nonfinite": 20}
    run(tmp_path, steps=5, **changes)
    assert events == ["queue", "queue", "wait", "queue", "wait", "queue", "wait", 3, "queue", "wait", "wait", 2]
    metrics = series(tmp_path, "train/loss")
    assert list(metrics) == [3, 5]


def test_the_cadence_of_the_log_changes_no_number(tmp_path):
    """Means over steps that were fetched together are those of steps that were fetched one by one."""
    for log in (1, 4):
        run(tmp_path / str(log), cadence__log=log, max_nonfinite=20)
    each, together = (series(tmp_path / log, "train/loss") for log in "14")
    for step in (4, 8):
        assert together[step] == np.mean([each[i] for i in range(step - 3, step + 1)])


@pytest.mark.parametrize("donated", [True, False])
def test_state_is_donated(tmp_path, monkeypatch, donated):
    """The memory of the old state is reused, except on a CPU."""
    if donated:
        monkeypatch.setattr(train_step, "donates", lambda mesh: True)
    seen = []
    original = run_module.make_train_step

    def spied(*args):
        lower = original(*args).lower

        def lowered(state, *rest):
            seen.append(state)
            return lower(state, *rest)

        return type("Step", (), {"lower": staticmethod(lowered)})()

    monkeypatch.setattr(run_module, "make_train_step", spied)
    run(tmp_path, steps=2)
    state = (seen[0].params, seen[0].opt_state, seen[0].ema)
    assert all(x.is_deleted() == donated for x in jax.tree.leaves(state))


@pytest.mark.parametrize("donated", [True, False])
def test_checkpoint_is_of_its_step(tmp_path, monkeypatch, donated):
    """A checkpoint written during training equals that of a run which ended there, with and without donation."""
    monkeypatch.setattr(train_step, "donates", lambda mesh: donated)
    run(tmp_path / "longer")
    ended = run(tmp_path / "ended", steps=5)
    with Checkpoints(str(tmp_path / "longer"), read_only=True) as checkpoints:
        assert checkpoints.steps == [5, 10]
        assert_states_equal(checkpoints.restore_params(5, ema=False), ended.params)
        assert_states_equal(checkpoints.restore_params(5), ended.ema)


@pytest.mark.parametrize(
    "changes, error, token",
    [
        ({"mesh__data": 3, "mesh__tensor": 3}, MeshError, "tensor=3"),
        ({"mesh__data": 8, "batch_size": 12}, MeshError, "multiple of 8"),
        ({"steps": 0}, ConfigError, "config.steps"),
        ({"max_nonfinite": 0}, ConfigError, "config.max_nonfinite"),
        ({"cadence__log": 0}, ConfigError, "config.cadence.log"),
        ({"timeout_seconds__data": 0.0}, ConfigError, "config.timeout_seconds.data"),
        ({"timeout_seconds__data": float("inf")}, ConfigError, "config.timeout_seconds.data"),
        ({"profile_steps": -1}, ConfigError, "config.profile_steps"),
        ({"schedules__learning_rate__kind": "magic"}, ConfigError, "magic"),
        ({"task": "unheard"}, ConfigError, "unheard"),
    ],
)
def test_rejects_configurations(tmp_path, changes, error, token):
    with pytest.raises(error, match=token):
        config = tiny_config(**changes)
        train(config, str(tmp_path), None if "task" in changes else tiny_job(config))


def test_rejects_workdirs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        run(tmp_path / "file")
    with pytest.raises(ConfigError, match="--workdir"):
        run("")


def test_rejects_unknown_options(tmp_path):
    config = tiny_config()
    with config.unlocked():
        config.optimizer.beta1 = 0.9
    with pytest.raises(ConfigError, match="beta1"):
        train(config, str(tmp_path), tiny_job(config))


def test_rejects_another_model(uninterrupted):
    workdir, _ = uninterrupted
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ConfigMismatch, match="model.hidden"):
        run(workdir, model__hidden=32)
    assert (workdir / "config.json").read_bytes() == before


def test_starts_from_parameters_of_another_run(uninterrupted, tmp_path):
    """Where name and shape agree, parameters and average start from the other run's average, only at step 0."""
    other, theirs = uninterrupted

    def started(name, start_from, **changes):
        config = tiny_config(schedules__learning_rate__value=0.0, cadence__checkpoint=1, **changes)
        config.start_from = start_from
        return train(config, str(tmp_path / name), tiny_job(config))

    same = started("same", str(other), steps=1)
    for ours in (same.params, same.ema):
        assert_states_equal(jax.device_get(ours), jax.device_get(theirs.ema))
    assert int(same.step) == 1 and int(started("same", str(other), steps=2).step) == 2
    wider = same.replace(params={**same.params, "up": {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)}})
    mixed = warm_start(
        wider.replace(params=jax.tree.map(jnp.ones_like, wider.params)), str(other), str(tmp_path), "tiny"
    )
    np.testing.assert_array_equal(mixed.params["up"]["kernel"], np.ones((8, 32)))
    assert_states_equal(jax.device_get(mixed.params["down"]), jax.device_get(theirs.ema["down"]))
    with pytest.raises(ConfigError, match="start_from"):
        warm_start(same.replace(params={"other": same.params}), str(other), str(tmp_path), "tiny")
    with pytest.raises(CheckpointError, match="nowhere"):
        started("missing", str(tmp_path / "nowhere"), steps=1)


def test_data_that_ends(tmp_path):
    config = tiny_config()
    job = tiny_job(config)

    class Two:
        batches, closed = 2, False

        def __next__(self):
            self.batches -= 1
            if self.batches < 0:
                raise StopIteration
            return {"x": np.ones((16, 8), np.float32), "y": np.ones((16, 4), np.float32)}

        def get_state(self):
            return self.batches

        def close(self):
            self.closed = True

    two = Two()
    with pytest.raises(DataError, match="ended"):
        train(config, str(tmp_path), dataclasses.replace(job, train_batches=lambda: two))
    assert two.closed


def test_full_disk_while_saving(tmp_path, monkeypatch):
    original = run_module.Checkpoints.save

    def save(self, step, *rest):
        if step == 10:

            def full(*_, **__):
                raise OSError(28, "No space left on device")

            monkeypatch.setattr("tensorstore.open", full)
        original(self, step, *rest)

    monkeypatch.setattr(run_module.Checkpoints, "save", save)
    with pytest.raises(CheckpointError, match="no space left"):
        run(tmp_path)
    monkeypatch.undo()
    assert int(run(tmp_path).step) == 10  # resumes from step 5


def test_stops_on_a_signal_and_resumes(uninterrupted, tmp_path):
    """In this process: after SIGTERM or Ctrl-C the state is saved and the previous handlers are restored."""
    workdir, state = uninterrupted
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number, at in ((signal.SIGTERM, 3), (signal.SIGINT, 7)):
        config = tiny_config()
        job = tiny_job(config)
        counts = iter(range(at if number == signal.SIGTERM else at - 3, 0, -1))

        def data_counts(counts=counts, number=number):
            if next(counts, 0) == 1:
                os.kill(os.getpid(), number)
            return {"unreadable": 2}

        with pytest.raises(Preempted) as stopped:
            train(config, str(tmp_path), dataclasses.replace(job, data_counts=data_counts))
        assert stopped.value.code == 0 and "saved" in stopped.value.message
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert_states_equal(run(tmp_path), state)
    assert series(tmp_path, "train/loss") == series(workdir, "train/loss")


def test_a_signal_before_the_first_step(tmp_path):
    """A signal while data, checkpoint and program are prepared loses nothing."""
    config = tiny_config()
    job = tiny_job(config)

    def train_batches():
        os.kill(os.getpid(), signal.SIGTERM)
        return job.train_batches()

    for step in (0, 5):
        with pytest.raises(Preempted) as stopped:
            train(config, str(tmp_path), dataclasses.replace(job, train_batches=train_batches))
        assert f"step {step} of 10" in stopped.value.message
        run(tmp_path, steps=5)


def test_a_signal_at_the_last_step(tmp_path):
    """A signal during the last evaluation stops the process, so that no other training starts."""
    config = tiny_config(steps=2)
    job = tiny_job(config)

    def eval_batches():
        os.kill(os.getpid(), signal.SIGTERM)
        return job.eval_batches()

    with pytest.raises(Preempted):
        train(config, str(tmp_path), dataclasses.replace(job, eval_batches=eval_batches))
    assert int(run(tmp_path, steps=2).step) == 2


def test_hosts_agree_on_a_step_across_trainings(tmp_path, monkeypatch):
    """JAX's service gets numbers that rise by one, although each training counts from 0."""
    asked = []
    ask = lambda number: asked.append(number) or False
    monkeypatch.setattr("jax.experimental.multihost_utils.reached_preemption_sync_point", ask)
    for name in "ab":
        run(tmp_path / name, steps=3, cadence__checkpoint=2)
    assert asked == list(range(asked[0], asked[0] + 8))


def test_a_closed_output_does_not_stop_it(tmp_path, monkeypatch):
    """A Ctrl-C in `train | tee log` ends tee too, but the training must still save."""

    class Broken(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Broken())
    assert int(run(tmp_path, steps=2).step) == 2


def test_the_configuration_in_the_workdir(tmp_path, caplog):
    """config.json belongs to the longest training. The checkpoint's configuration replaces a damaged one."""
    run(tmp_path, steps=2)
    run(tmp_path, steps=1)
    assert read_config(tmp_path)["steps"] == 2
    stored = read_config(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"steps": 2', '"steps": 6'))
    assert read_config(tmp_path) == stored and caplog.text.count("config.json.sha256") == 1
    run(tmp_path, steps=2)
    (tmp_path / "config.json.sha256").unlink()  # as in earlier versions: an error for readers, and written again
    (tmp_path / "config.json").write_text('{"steps": 2, "se')
    with pytest.raises(CheckpointError, match="config.json"):
        read_config(tmp_path)
    for steps in (1, 3):
        run(tmp_path, steps=steps)
        assert read_config(tmp_path)["steps"] == steps


@needs_full_device
def test_full_disk_at_the_start(tmp_path, monkeypatch):
    fill_disk(monkeypatch, "config.json")
    with pytest.raises(UserError, match="config.json"):
        run(tmp_path)


def test_trains_in_a_thread(tmp_path):
    states = []
    thread = threading.Thread(target=lambda: states.append(run(tmp_path, steps=1)))
    thread.start()
    thread.join()
    assert int(states[0].step) == 1


def test_sigterm_of_a_process(uninterrupted, tmp_path):
    """A real process saves on SIGTERM and exits with status 0; the same command then reaches the same end."""
    workdir, state = uninterrupted
    script = textwrap.dedent("""
        import sys, time
        from tiny_job import tiny_config, tiny_job
        from dalle_jax.training.loop import train
        import dataclasses

        def data_counts():
            print("logged", flush=True)
            time.sleep(float(sys.argv[2]))
            return {"unreadable": 2}

        config = tiny_config()
        train(config, sys.argv[1], dataclasses.replace(tiny_job(config), data_counts=data_counts))
        print("done")
    """)
    start = lambda seconds: spawn(["-c", script, str(tmp_path), str(seconds)], devices=8)
    process = start(0.3)
    for line in process.stdout:
        if line.startswith("logged"):
            process.send_signal(signal.SIGTERM)
            break
    ((status, out, log),) = finish([process])
    assert status == 0 and "the same command resumes" in out + log and "done" not in out, log
    ((status, out, log),) = finish([start(0.0)])
    assert status == 0 and "resuming from step" in out + log and "done" in out, log
    assert series(tmp_path, "train/loss") == series(workdir, "train/loss")
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore_params(ema=False), state.params)


def test_average_follows_the_parameters(tmp_path):
    """The loop keeps the average that `update_average` defines."""
    states = [run(tmp_path / str(n), steps=n, ema__decay=0.5) for n in (1, 2)]
    expected = update_average(states[0].ema, states[1].params, jnp.int32(2), AverageOptions(decay=0.5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), states[1].ema, expected)
