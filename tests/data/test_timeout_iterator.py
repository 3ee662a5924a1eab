"""A wait for data ends with the data, with an error of the source, or at the timeout."""

import multiprocessing
import signal
import threading
import time

import grain
import numpy as np
import pytest
from absl import flags

from dalle_jax.data.timeout_iterator import TimeoutIterator
from dalle_jax.errors import DataError, StuckDataError


class Counting:
    """Yields 0, 1 and 2; has grain's state."""

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


def test_passes_items_and_state_on():
    source = Counting()
    iterator = TimeoutIterator(source, 60.0)
    assert next(iterator) == 0 and source.given == iterator.get_state() == 1  # nothing is read ahead
    iterator.set_state(2)
    assert list(iterator) == [2] and list(iterator) == []
    iterator.close()
    assert source.closed and iterator._thread is None


def test_passes_errors_on():
    def broken():
        yield 1
        raise KeyError("x")

    iterator = TimeoutIterator(broken(), 60.0)
    assert next(iterator) == 1
    with pytest.raises(KeyError, match="x"):
        next(iterator)
    iterator.close()


def test_timeout():
    released = threading.Event()

    def stuck():
        yield 1
        released.wait()

    iterator = TimeoutIterator(stuck(), 60.0)
    assert next(iterator) == 1
    iterator._seconds = 0.1
    for _ in range(2):
        with pytest.raises(StuckDataError, match="config.timeout_seconds.data"):
            next(iterator)
    iterator.close()  # returns at once
    released.set()


@pytest.fixture
def python_handles_sigint():
    """Sets Python's handler for Ctrl-C, which `nohup pytest &` lacks because it ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_interrupts_a_wait(python_handles_sigint):
    """The wait ends at once, and closing does not wait for an item that may never come."""
    waiting, released = threading.Event(), threading.Event()

    def stuck():
        waiting.set()
        released.wait()
        yield 1

    def interrupt():
        waiting.wait()
        time.sleep(0.2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    iterator, began = TimeoutIterator(stuck(), 60.0), time.monotonic()
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    iterator.close()
    with pytest.raises(StuckDataError):  # the source is not asked again
        next(iterator)
    assert time.monotonic() - began < 30
    released.set()


@pytest.mark.slow
def test_a_dead_worker_is_an_error():
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    dataset = grain.MapDataset.range(10**6).map(np.int64).to_iter_dataset()
    options = grain.MultiprocessingOptions(num_workers=1, per_worker_buffer_size=1)
    iterator = TimeoutIterator(iter(dataset.mp_prefetch(options)), 120.0)
    next(iterator)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DataError, match="exit code -9"):
        for _ in range(100):
            next(iterator)
    iterator.close()
