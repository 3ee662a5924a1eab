"""Two processes that prepare one data set wait for each other, and killed ones leave nothing."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_copies
from absl import logging

from dalle_jax.data.builders.turn import only_one_prepares
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.sources.tar_shards import shards_source

HOLDS = """
import pathlib, sys, time
from dalle_jax.data.builders.turn import only_one_prepares
folder = pathlib.Path(sys.argv[1])
with only_one_prepares(folder, "birds"):
    (folder.parent / "incomplete.ABCDEF_1.0.0").mkdir()
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is preparing tmp_path/birds/config/1.0.0."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "birds" / "config" / "1.0.0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_second_process_waits_until_the_first_is_gone(tmp_path, holder, monkeypatch):
    lines, order = [], []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))

    def prepare():
        with only_one_prepares(tmp_path / "birds" / "config" / "1.0.0", "birds"):
            order.append("prepared")

    waiting = threading.Thread(target=prepare)
    waiting.start()
    while not lines:
        time.sleep(0.02)
    assert str(holder.pid) in lines[0] and "birds" in lines[0] and not order
    leftover = tmp_path / "birds" / "config" / "incomplete.ABCDEF_1.0.0"
    assert leftover.exists()
    order.append("killed")
    holder.send_signal(signal.SIGKILL)
    waiting.join(20)
    assert order == ["killed", "prepared"] and not leftover.exists()


def test_leftovers_of_other_configurations_are_removed_unless_they_are_being_written(tmp_path, holder):
    abandoned = tmp_path / "birds" / "old" / "incomplete.XYZXYZ_1.0.0"
    abandoned.mkdir(parents=True)
    (abandoned / "part").write_text("x")
    complete = tmp_path / "birds" / "old" / "1.0.0"
    complete.mkdir()
    with only_one_prepares(tmp_path / "birds" / "new" / "1.0.0", "birds"):
        assert not abandoned.exists() and complete.exists()
        assert (tmp_path / "birds" / "config" / "incomplete.ABCDEF_1.0.0").exists(), "its process is alive"


def test_threads_take_turns_and_prepare_once(tmp_path, monkeypatch):
    tiny_copies.tar_shards(tmp_path / "shards", shards=1)
    written, original, sizes = [], shards_source._write, []
    monkeypatch.setattr(shards_source, "_write", lambda *args: (time.sleep(0.3), written.append(1), original(*args)))
    options = DataOptions(source="tar_shards", path=str(tmp_path / "shards"), data_dir=str(tmp_path / "data"))
    threads = [threading.Thread(target=lambda: sizes.append(len(open_source(options, "all")))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sizes == [10] * 3 and written == [1]


def test_the_lock_names_its_process(tmp_path):
    with only_one_prepares(tmp_path / "set" / "1.0.0", "set"):
        assert (tmp_path / "set" / ".preparing").read_text() == f"{os.getpid()}\n"
    with only_one_prepares("memory://set/1.0.0", "set"):
        pass
