"""Waiting for data ends: with the data, with whatever the source raises, or with the time."""

import multiprocessing
import signal
import threading
import time

import grain
import numpy as np
import pytest
from absl import flags

from dalle_jax.data.timeout_iterator import Patient
from dalle_jax.errors import DataError, StuckDataError


class Counting:
    """0, 1, 2 and no more; with grain's state."""

    def __init__(self):
        self.given, self.closed = 0, False

    def __next__(self):
        if self.given == 3:
            raise StopIteration
        self.given += 1
        return self.given - 1

    def get_state(self):
        return self.given

    def set_state(self, state):
        self.given = state

    def close(self):
        self.closed = True


def test_passes_everything_on():
    source = Counting()
    patient = Patient(source, 60.0)
    assert next(patient) == 0 and source.given == patient.get_state() == 1  # nothing is read ahead
    patient.set_state(2)
    assert list(patient) == [2] and list(patient) == []
    patient.close()
    assert source.closed and patient._thread is None


def test_passes_errors_on():
    def broken():
        yield 1
        raise KeyError("x")

    patient = Patient(broken(), 60.0)
    assert next(patient) == 1
    with pytest.raises(KeyError, match="x"):
        next(patient)
    patient.close()


def test_time_is_up():
    released = threading.Event()

    def stuck():
        yield 1
        released.wait()

    patient = Patient(stuck(), 60.0)
    assert next(patient) == 1
    patient._seconds = 0.1
    for _ in range(2):
        with pytest.raises(StuckDataError, match=r"no batch for 0.1 seconds \(config.timeout_seconds.data\)"):
            next(patient)
    patient.close()  # does not wait
    released.set()


def test_a_wait_that_is_interrupted():
    """By a Ctrl-C: it ends at once, and closing does not wait for what may never come."""
    waiting, released = threading.Event(), threading.Event()

    def stuck():
        waiting.set()
        released.wait()
        yield 1

    def interrupt():
        waiting.wait()
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    patient, began = Patient(stuck(), 60.0), time.monotonic()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        next(patient)
    patient.close()
    with pytest.raises(StuckDataError):  # nor is it asked again
        next(patient)
    assert time.monotonic() - began < 30
    released.set()


@pytest.mark.slow
def test_worker_is_gone():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.range(10**6).map(np.int64).to_iter_dataset()
    options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=1)
    patient = Patient(iter(dataset.mp_prefetch(options)), 120.0)
    next(patient)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DataError, match="worker process that reads the data is gone.*exit code -9"):
        for _ in range(100):
            next(patient)
    patient.close()
