"""Worker processes survive the signals that their training answers, and end with the training."""

import os
import signal
import time

import numpy as np
import pytest
from memory_source import SIZE, MemorySource
from processes import finish, spawn

from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources import source as source_module
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.token_store import TokensInMemory

READER = """
import multiprocessing, signal, sys, threading, time

sys.path.insert(0, "tests")
from memory_source import SIZE, MemorySource

from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.source import DataOptions

if __name__ == "__main__":
    asked = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.set())
    pipeline = lambda train: Pipeline(DataOptions(image_size=SIZE, workers=2), split="train", train=train, batch_size=8,
                                      seed=0, source=MemorySource(side=12))
    with iter(pipeline(True)) as batches:
        def report():
            while len(multiprocessing.active_children()) < 2:
                time.sleep(0.01)
            print("starting", flush=True)

        threading.Thread(target=report).start()
        next(batches)
        print(*[child.pid for child in multiprocessing.active_children()], flush=True)
        while not asked.is_set():
            next(batches)
        kept = [next(batches) for _ in range(20)]  # more than the workers' buffers hold
    with iter(pipeline(False)) as batches:
        kept.append(next(batches))
    print("whole")
"""


@pytest.fixture
def reader(tmp_path):
    """A process that reads with two workers until a signal, and then some further batches."""
    script = tmp_path / "reader.py"
    script.write_text(READER)
    process = spawn([str(script)], session=True)
    assert process.stdout.readline() == "starting\n", process.communicate()
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("early", [False, True])
def test_a_signal_to_all_processes(reader, number, early):
    """A terminal or a batch system signals all processes; the reader ends without any message on stderr.

    `early`: the signal comes as soon as the workers exist, long before they run our code.
    """
    if not early:
        assert len(reader.stdout.readline().split()) == 2
    os.killpg(reader.pid, number)
    ((status, out, error),) = finish([reader])
    assert status == 0 and out.endswith("whole\n") and not error, (out, error)


def command_line(pid):
    """Returns a process's command line; empty if it has ended, even if its parent has not collected its status."""
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return file.read()
    except OSError:
        return ""


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs /proc")
def test_no_worker_is_left_behind(reader):
    workers = [int(pid) for pid in reader.stdout.readline().split()]
    assert len(workers) == 2
    reader.kill()
    reader.communicate()
    deadline = time.monotonic() + 60
    while any(command_line(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    "cores, given, count", [(3, None, 3), (200, None, 32), (3, 0, 0), (3, 5, 5), (2, 64, 64)], ids=str
)
def test_as_many_processes_as_cores(monkeypatch, cores, given, count):
    monkeypatch.setattr(source_module, "_available_cores", lambda: cores)
    options = DataOptions(image_size=SIZE, workers=given)
    make = lambda train, **how: Pipeline(
        options, split="train", train=train, batch_size=8, source=MemorySource(), **how
    )
    assert iter(make(True))._workers == count
    assert iter(make(False))._workers == min(count, 5)  # 37 examples are 5 batches
    tokens = TokensInMemory(np.zeros((37, 4), np.uint16), {})
    assert iter(make(True, tokens=tokens))._workers == (0 if given is None else count)  # nothing is decoded


def test_the_cores_that_this_process_may_use():
    assert source_module._available_cores() == len(os.sched_getaffinity(0))
