"""Tests that real training processes survive faults.

The process is `survival_process.py`: twelve steps, with a checkpoint after every third.
"""

import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import survival_process
from processes import finish, free_address, host_flags, spawn
from tiny_job import tiny_job

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.reporting.metric_writer import read_metrics
from dalle_jax.training.loop import train

PATIENCE = 300  # seconds until a test fails; on an idle machine each needs less than a tenth of it


def command(workdir, *flags, hosts=(), devices=1, **environment):
    script = "tests/survival_process.py"
    return spawn([script, f"--config={script}", f"--workdir={workdir}", *hosts, *flags], devices, **environment)


def run(workdir, *flags, **environment):
    """Runs the command to its end and returns its status and output."""
    ((status, out, error),) = finish([command(workdir, *flags, **environment)], PATIENCE)
    return status, out + error


def start_hosts(workdir, *flags, count=2, **environment):
    """Starts the command on `count` hosts with one device each."""
    address = free_address()
    flags = (f"--config.mesh.data={count}", "--lost_host_seconds=10", *flags)
    return [command(workdir, *flags, hosts=host_flags(address, count, i), **environment) for i in range(count)]


def wait_for_steps(process, count):
    for line in process.stdout:
        count -= line.startswith("logged")
        if count == 0:
            return
    raise AssertionError(f"The process ended too early: {process.communicate()}")


def losses(workdir):
    return {line["step"]: line["train/loss"] for line in read_metrics(str(workdir)) if "train/loss" in line}


def final(workdir, step=None):
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        assert step is None or checkpoints.latest_step == step
        return jax.device_get([checkpoints.restore_params(ema=ema) for ema in (False, True)])


def assert_same_end(workdir, other, tolerance=0.0):
    assert losses(workdir).keys() == losses(other).keys()
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)
    jax.tree.map(same, list(losses(workdir).values()), list(losses(other).values()))
    jax.tree.map(same, final(workdir, 12), final(other, 12))


def complete_steps(workdir):
    folder = workdir / "checkpoints"
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit()) if folder.exists() else []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The workdir of an uninterrupted run in this process."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    config = survival_process.get_config()
    train(config, str(workdir), tiny_job(config))
    return workdir


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


def kill_repeatedly(undisturbed, workdir, moments):
    """Kills a process at its N-th change of a checkpoint file, for each N, then runs one to the end."""
    for moment in moments:
        before = complete_steps(workdir)
        status, said = run(workdir, FAULT=f"file_events:{moment}")
        assert status == -signal.SIGKILL, said
        start = max(before, default=0)
        assert not before or f"from step {start} of 12" in said
        done = start + max(said.count("logged\n") - 1, 0)  # or more
        assert done - max(complete_steps(workdir), default=0) <= 2 * 3, said  # one more may be half written
    status, said = run(workdir)
    assert status == 0 and "done at step 12" in said, said
    assert_same_end(workdir, undisturbed)
    assert not [name for name in os.listdir(workdir / "checkpoints") if "tmp" in name or "damaged" in name]


def test_killed_while_saving(undisturbed, tmp_path):
    """Kills it in the middle of the second checkpoint, then soon after the start."""
    kill_repeatedly(undisturbed, tmp_path, [random.Random(0).randrange(60, 90), 5])


@pytest.mark.slow
def test_killed_at_any_file(undisturbed, tmp_path):
    draw = random.Random(1)
    kill_repeatedly(undisturbed, tmp_path, [draw.randrange(1, 60) for _ in range(8)])


@pytest.mark.slow
def test_killed_at_any_time(undisturbed, tmp_path):
    """Kills it from outside at a random time after a random step, whatever its native threads are doing."""
    draw = random.Random(2)
    for _ in range(5):
        before = complete_steps(tmp_path)
        process = command(tmp_path, FAULT="slow:0.3")
        wait_for_steps(process, draw.randrange(1, 5))
        time.sleep(draw.random() * 0.3)
        process.kill()
        finish([process])
        assert complete_steps(tmp_path)[-1:] >= before[-1:]
        if 12 in complete_steps(tmp_path):
            break
    status, said = run(tmp_path)
    assert status == 0, said
    assert_same_end(tmp_path, undisturbed)


# -- damaged checkpoints -----------------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 16
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize(
    "harm, item, file",
    [
        (truncate, "params", "d/*"),
        pytest.param(flip, "ema", "d/*", marks=pytest.mark.slow),
        pytest.param(remove, "rest", "manifest.ocdbt", marks=pytest.mark.slow),
        pytest.param(truncate, "config", "metadata", marks=pytest.mark.slow),
        pytest.param(flip, "data", "process_0-of-1.json", marks=pytest.mark.slow),
    ],
)
def test_damaged_newest(undisturbed, tmp_path, harm, item, file):
    """The damaged checkpoint is named, skipped and renamed; the run resumes from the one before and rewrites it."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints" / "12" / item).glob(file):
        harm(path)
    status, said = run(tmp_path)
    assert status == 0 and "from step 9 of 12" in said, said
    assert f"checkpoints/12 is damaged ({item}: " in said and "12.damaged" in said
    assert (tmp_path / "checkpoints" / "12.damaged").is_dir()
    assert_same_end(tmp_path, undisturbed)


@pytest.mark.slow
def test_all_damaged(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "checkpoints").glob("*/params/d/*"):
        truncate(path)
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    status, said = run(tmp_path)
    assert status == 1 and "error: " in said and "step 12: params: " in said and "step 9: " in said
    assert sorted(os.listdir(tmp_path / "checkpoints")) == before


# -- numbers, data -----------------------------------------------------------------------------------------------------


def test_numbers_gone_bad(undisturbed, tmp_path):
    """After `max_nonfinite` steps the status is 1; earlier checkpoints are good, and a healthy command resumes."""
    status, said = run(tmp_path, FAULT="poison:5")
    assert status == 1 and "error: " in said and "3 steps in a row (steps 6 to 8)" in said, said
    assert complete_steps(tmp_path) == [3]  # that of step 6 would be among skipped updates
    assert run(tmp_path)[0] == 0
    assert_same_end(tmp_path, undisturbed)


def test_stuck_data(tmp_path):
    began = time.monotonic()
    status, said = run(tmp_path, "--config.timeout_seconds.data=5", FAULT="stall:7")
    assert status == 1 and "error: " in said and "config.timeout_seconds.data" in said, said
    assert said.count("logged\n") >= 3 and "Traceback" not in said
    assert time.monotonic() - began < PATIENCE / 2
    assert complete_steps(tmp_path)[:1] == [3]


def test_a_second_ctrl_c(tmp_path):
    """A second Ctrl-C does not wait for data."""
    process = command(tmp_path, FAULT="stall:7")
    wait_for_steps(process, 4)
    for _ in range(2):
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
    ((status, _, error),) = finish([process], PATIENCE)
    assert status == 130 and "Ctrl-C" in error and "error: interrupted" in error, error
    assert "Traceback" not in error and complete_steps(tmp_path)[:1] == [3]


# -- several hosts -----------------------------------------------------------------------------------------------------


def stop_one(workdir, which, how=signal.SIGTERM):
    """Signals one of two hosts and returns the step at which both report that they saved."""
    processes = start_hosts(workdir, FAULT="slow:1")  # they have ten seconds to agree on a step
    wait_for_steps(processes[0], 2)
    processes[which].send_signal(how)
    said = finish(processes, PATIENCE)
    assert [status for status, *_ in said] == [0, 0], said
    (step,) = complete_steps(workdir)[-1:]
    assert 2 <= step < 12 and f"stopped at step {step} of 12" in said[0][1], said
    assert not any("Traceback" in error for _, _, error in said), said
    assert "done" not in said[0][1] + said[1][1]
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        folder = checkpoints.directory / str(step) / "data"
    assert sorted(path.name for path in folder.glob("process_*")) == ["process_0-of-2.json", "process_1-of-2.json"]
    return step


def test_sigterm_of_one_host(undisturbed, tmp_path):
    """Both save at one step and exit with status 0; one host then resumes alone on eight devices in another mesh."""
    step = stop_one(tmp_path, 1)
    mesh = [f"--config.mesh.{axis}=2" for axis in ("data", "fsdp", "tensor")]
    status, said = run(tmp_path, *mesh, devices=8)
    assert status == 0 and f"from step {step} of 12" in said, said
    assert_same_end(tmp_path, undisturbed, 1e-5)


@pytest.mark.slow
def test_sigterm_of_the_first_host(tmp_path):
    """The same command on both hosts resumes bit for bit."""
    step = stop_one(tmp_path / "stopped", 0)
    for name in ("stopped", "whole"):
        said = finish(start_hosts(tmp_path / name), PATIENCE)
        assert [status for status, *_ in said] == [0, 0], said
        assert name == "whole" or f"from step {step} of 12" in said[0][1]
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_of_one_host(tmp_path):
    stop_one(tmp_path, 1, signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2])
def test_a_signal_to_all_processes_of_a_host(tmp_path, hosts):
    """The data workers of a real training get the signal too, as at a machine's shutdown."""
    address = free_address()
    command = ["-m", "dalle_jax.main", f"--config=tests/small_prior.py:{tmp_path}", "--config.data.workers=2"]
    endless = [f"--config.cadence.{name}=0" for name in ("eval", "preview", "checkpoint")] + ["--config.steps=1000000"]
    processes = [
        spawn([*command, *endless, *host_flags(address, hosts, i)], devices=4 // hosts, session=True)
        for i in range(hosts)
    ]
    for line in processes[0].stdout:
        if f"{tmp_path}/prior: " in line and "compiled in" in line:
            break
    os.killpg(processes[-1].pid, signal.SIGTERM)
    said = finish(processes, PATIENCE)
    assert [status for status, *_ in said] == [0] * hosts, said
    assert "stopped at step" in said[0][1] and not any("Traceback" in error for *_, error in said), said
    assert complete_steps(tmp_path / "prior")


def test_an_error_of_one_host(tmp_path):
    """The host ends with its own error and status, the other reports a lost host; neither waits or aborts."""
    first, second = finish(start_hosts(tmp_path, FAULT="fail:8"), PATIENCE)
    assert second[0] == 1 and "error: a bad image on this host" in second[2], second
    assert first[0] == 1 and "was lost" in first[2], first
    assert "Traceback" not in first[2] + second[2] and "Fatal Python error" not in first[2] + second[2]
    assert complete_steps(tmp_path)[:1] == [3]


@pytest.mark.slow
def test_resumes_on_two_hosts(undisturbed, tmp_path):
    """Both hosts resume from the same checkpoint of one host, because the newest is damaged."""
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    truncate(next((tmp_path / "checkpoints" / "12" / "rest" / "d").iterdir()))
    said = finish(start_hosts(tmp_path), PATIENCE)
    assert [status for status, *_ in said] == [0, 0] and "from step 9 of 12" in said[0][1], said
    assert all("12 is damaged (rest: " in error for _, _, error in said)
    assert (tmp_path / "checkpoints" / "12.damaged").is_dir()
    assert_same_end(tmp_path, undisturbed, 1e-5)


@pytest.mark.parametrize(
    "how, which",
    [
        (signal.SIGKILL, 1),
        pytest.param(signal.SIGKILL, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.slow),
    ],
)
def test_lost_host(tmp_path, how, which):
    """If a host is gone, or silent for --lost_host_seconds, the other one ends with an error that says so."""
    processes = start_hosts(tmp_path, "--config.steps=100000", "--config.cadence.eval=0", FAULT="slow:0.3")
    wait_for_steps(processes[0], 8)
    processes[which].send_signal(how)
    began = time.monotonic()
    try:
        (status, _, error) = finish([processes[1 - which]], PATIENCE)[0]
        if (how, which) == (signal.SIGKILL, 0):  # JAX's own service ended: JAX aborts at once with its own message
            assert status not in (0, -signal.SIGKILL) and ("was lost" in error or "another task died" in error), error
        else:
            assert status == 1 and "was lost" in error and "Traceback" not in error, (status, error)
        assert how == signal.SIGKILL or f"Host {which} of 2 was lost" in error
        assert time.monotonic() - began < PATIENCE / 2
    finally:
        processes[which].kill()
        processes[which].communicate()
    assert 3 in complete_steps(tmp_path) or 6 in complete_steps(tmp_path)


@pytest.mark.slow
def test_a_step_that_takes_too_long(undisturbed, tmp_path):
    """All hosts are alive, but a device of one never ends its step: both hosts end and name the timeout.

    Without the fault the same command resumes from the last checkpoint.
    """
    limit, more = 40, 60  # seconds; starting needs less than the limit, noticing and ending less than the second
    flag = f"--config.timeout_seconds.step={limit}"
    processes = start_hosts(tmp_path, flag, FAULT="hang:7")
    wait_for_steps(processes[0], 6)
    for status, _, error in finish(processes, limit + more):
        assert status not in (0, -signal.SIGKILL), error
        assert "error: " in error and f"{limit} s (config.timeout_seconds.step)" in error, error
        assert "was lost" not in error and "Traceback" not in error, error
    assert complete_steps(tmp_path) == [3, 6]
    said = finish(start_hosts(tmp_path, flag), PATIENCE)
    assert [status for status, *_ in said] == [0, 0] and "from step 6 of 12" in said[0][1], said
    assert "damaged" not in said[0][2] + said[1][2]
    assert_same_end(tmp_path, undisturbed, 1e-5)
