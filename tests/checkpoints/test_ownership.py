"""One process at a time works in a workdir. The others say who does, and change nothing."""

import json
import os
import re
import signal
import threading
import time

import pytest
from absl import logging
from object_storage import emulated_bucket, names
from processes import finish, spawn

from dalle_jax.checkpoints import ownership
from dalle_jax.checkpoints.ownership import Owner, owned
from dalle_jax.errors import CheckpointError, ConfigError, WorkdirInUse

WORKS = """
import os, sys, time
from dalle_jax.checkpoints.ownership import owned
from dalle_jax.errors import WorkdirInUse
workdir, end, child = sys.argv[1:]
try:
    with owned(workdir):
        if child == "forks" and os.fork() == 0:
            time.sleep(30)
            os._exit(0)
        print("works", os.getpid(), flush=True)
        while not os.path.exists(end):
            time.sleep(0.02)
except WorkdirInUse as error:
    print("error:", error, flush=True)
"""


@pytest.fixture(scope="module")
def bucket():
    with emulated_bucket() as path:
        yield path


@pytest.fixture(params=["disk", "bucket"])
def workdir(request, tmp_path):
    if request.param == "disk":
        return str(tmp_path / "runs" / "a")
    return str(request.getfixturevalue("bucket") / tmp_path.name)


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts a process which works in a workdir until the file `end` exists."""
    started = []

    def start(workdir, child="", **environment):
        started.append(spawn(["-c", WORKS, str(workdir), str(tmp_path / "end"), child], **environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    return lines


def files(workdir):
    return names(ownership.full_path(workdir))


def change(workdir, **values):
    """Changes what owner.json says about its process."""
    path = ownership.full_path(workdir) / "owner.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_ten_at_once(workdir, start, tmp_path):
    count = 4 if workdir.startswith("gs://") else 10  # gcsfs takes seconds to import in each
    processes = [start(workdir) for _ in range(count)]
    said = [process.stdout.readline() for process in processes]
    (winner,) = [line.split()[1] for line in said if line.startswith("works")]
    others = [line for line in said if line.startswith("error:")]
    assert len(others) == count - 1 and all(f"process {winner} on " in line and workdir in line for line in others), (
        said
    )
    assert files(workdir) == ["owner.json"]
    (tmp_path / "end").touch()
    finish(processes, 60)
    assert not ownership.full_path(workdir).exists() or not files(workdir)
    with owned(workdir):
        assert files(workdir) == ["owner.json"]


@pytest.mark.parametrize("child", ["", "forks"])
def test_a_killed_process_frees_its_workdir(workdir, start, logged, child):
    """At once, even if a process that it has forked still runs."""
    process = start(workdir, child)
    pid = int(process.stdout.readline().split()[1])
    with pytest.raises(WorkdirInUse, match=str(pid)), owned(workdir):
        pass
    os.kill(pid, signal.SIGKILL)
    process.wait(30)
    with owned(workdir):
        assert len(logged) == 1 and f"process {pid} " in logged[0]
    with owned(workdir):
        assert len(logged) == 1


def test_an_owner_on_another_host(workdir, start, logged):
    """It counts as dead when its file was not refreshed for a while."""
    pid = start(workdir).stdout.readline().split()[1]
    os.kill(int(pid), signal.SIGKILL)
    change(workdir, host="far", kernel="other", refreshed=int(time.time()))
    with pytest.raises(WorkdirInUse, match="far.* 12[01] s"), owned(workdir):
        pass
    change(workdir, refreshed=int(time.time()) - 1000)
    with owned(workdir):
        assert "far" in logged[0]


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"[]", b"7", b'{"pid": 1', b"[" * 100_000])
def test_a_damaged_file_stops_nobody(workdir, content):
    folder = ownership.full_path(workdir)
    folder.mkdir(parents=True)
    (folder / "owner.json").write_bytes(content)
    with owned(workdir):
        assert Owner.read((folder / "owner.json").read_bytes()).pid == os.getpid()


def test_a_file_that_is_a_folder(tmp_path):
    (tmp_path / "owner.json").mkdir()
    with pytest.raises(ConfigError, match=r"owner\.json"), owned(tmp_path):
        pass


def test_blocks_inside_each_other(workdir):
    with owned(workdir) as outer:
        with owned(workdir) as inner:
            assert inner is outer
        failed = []

        def other():
            try:
                with owned(workdir):
                    pass
            except WorkdirInUse as error:
                failed.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert len(failed) == 1 and files(workdir) == ["owner.json"]


def test_an_owner_stays_the_owner(workdir, start, monkeypatch):
    """It refreshes its file, and writes it again if somebody removes it."""
    monkeypatch.setattr(ownership, "_REFRESH_SECONDS", 0.05)
    path = ownership.full_path(workdir) / "owner.json"
    with owned(workdir) as lease:
        change(workdir, refreshed=1)
        deadline = time.monotonic() + 20
        while not (found := Owner.read(path.read_bytes())) or found.refreshed == 1:
            assert time.monotonic() < deadline
            if workdir.startswith("gs://"):
                break  # another generation: the lease is lost, see below
            time.sleep(0.01)
    monkeypatch.setattr(ownership, "_REFRESH_SECONDS", 100.0)
    with owned(workdir) as lease:
        path.unlink()
        lease.check()
        assert start(workdir).stdout.readline().startswith("error:")
        lease.check()


def test_a_workdir_that_another_process_has_taken_over(workdir):
    with owned(workdir) as lease:
        change(workdir, token="another", pid=7)
        with pytest.raises(CheckpointError, match="process 7"):
            lease.check()
        path = ownership.full_path(workdir) / "owner.json"
        if not workdir.startswith("gs://"):
            path.unlink()
            path.write_text("{}")
    assert path.exists(), "it is the other one's"


def test_a_workdir_that_vanishes(tmp_path):
    with pytest.raises(CheckpointError, match="vanished"), owned(tmp_path / "a") as lease:
        os.rename(tmp_path / "a", tmp_path / "b")
        lease.check()
    with pytest.raises(CheckpointError, match="vanished"), owned(tmp_path / "a"):
        os.rename(tmp_path / "a", tmp_path / "c")
        raise FileNotFoundError
    with pytest.raises(FileNotFoundError), owned(tmp_path / "a"):
        raise FileNotFoundError
    assert sorted(os.listdir(tmp_path)) == ["b", "c"], "an empty workdir is removed again"


def test_a_workdir_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    for workdir in ("", tmp_path / "file", tmp_path / "file" / "a", tmp_path / ("x" * 300)):
        with pytest.raises(ConfigError, match="workdir"), owned(workdir):
            pass


def test_disks_without_locks(tmp_path, monkeypatch, start):
    """The file decides alone: a living process is left alone, a dead one is not."""
    monkeypatch.setattr(ownership.locks, "try_lock", lambda file: None)
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warned.append(text % values))
    pid = int(start(tmp_path).stdout.readline().split()[1])
    with pytest.raises(WorkdirInUse, match=str(pid)), owned(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while ownership._started(pid) is not None:
        assert time.monotonic() < deadline
    with owned(tmp_path):
        assert len(warned) == 1 and "cannot be locked" in warned[0]


def test_a_second_command_changes_nothing(tmp_path):
    """Nor does it read anything that could hide the reason."""
    script = "tests/survival_process.py"
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with owned(tmp_path):
        before = sorted(os.listdir(tmp_path))
        ((status, out, error),) = finish([spawn([script, f"--config={script}", f"--workdir={tmp_path}"])], 120)
    assert status == 1 and before == ["metrics.jsonl", "owner.json"], out + error
    assert re.search(rf"^error: {tmp_path} is in use: process {os.getpid()} on .*\n\Z", error, re.MULTILINE), error
    assert "Traceback" not in error and (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
