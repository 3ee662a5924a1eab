"""A real training process for tests of faults: `tiny_job` behind the command line of `dalle_jax.main`.

    python tests/survival_process.py --config=tests/survival_process.py --workdir=DIR [--config.key=value ...]

It prints "logged" after every step.  $FAULT selects a fault:

    stall:K           the data source never delivers batch K (counted from the start of the process)
    file_events:N     SIGKILL at the N-th time that a file below `checkpoints` is opened for writing, created, renamed
                      or removed
    poison:K          the loss is not a number from step K on
    hang:K            on the second host the device never ends a step after step K
    fail:K            the second host cannot read its batch K
    slow:S            each step takes S seconds more
"""

import dataclasses
import os
import signal
import sys
import threading
import time

import jax

if __name__ == "__main__":
    sys.modules["torch"] = None  # tensorboardX would import it, which takes half of the start-up time

from tiny_job import tiny_config, tiny_job  # noqa: E402

from dalle_jax import main  # noqa: E402
from dalle_jax.errors import DataError  # noqa: E402
from dalle_jax.training.loop import train  # noqa: E402

FAULT, _, COUNT = os.environ.get("FAULT", "").partition(":")


def get_config():
    return tiny_config(steps=12, cadence__checkpoint=3, cadence__eval=6)


class Stopping:
    """An iterator that calls `then` after `left` batches."""

    def __init__(self, batches, left, then):
        self._batches, self._left, self._then = batches, left, then
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        if self._left == 0:
            self._then()
        self._left -= 1
        return next(self._batches)


def stall():
    threading.Event().wait()


def fail():
    if jax.process_index() == 1:
        raise DataError("a bad image on this host")


def hang_from(step, host, loss):
    """Returns a `loss` in which the device of that host waits forever. Its other threads continue."""

    def wait(now):
        if now >= step and jax.process_index() == host:
            threading.Event().wait()

    def hanging(params, frozen, batch, key, now):
        jax.debug.callback(wait, now, partitioned=True)  # on each device, not on the first host only
        return loss(params, frozen, batch, key, now)

    return hanging


def logged():
    print("logged", flush=True)
    time.sleep(float(COUNT) if FAULT == "slow" else 0.0)
    return {}


def run(config, workdir):
    job = tiny_job(config, poison=range(int(COUNT), config.steps) if FAULT == "poison" else ())
    if FAULT == "hang":
        job.task.loss = hang_from(int(COUNT), 1, job.task.loss)
    batches = job.train_batches
    if FAULT in ("stall", "fail"):
        batches = lambda: Stopping(job.train_batches(), int(COUNT), {"stall": stall, "fail": fail}[FAULT])
    state = train(config, workdir, dataclasses.replace(job, train_batches=batches, data_counts=logged))
    print(f"done at step {int(state.step)}", flush=True)


def kill_at_file_event(number):
    left = [number]
    events = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open"}

    def hook(event, arguments):
        if event not in events or "checkpoints/" not in f"{arguments[0]}/":
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return left


if __name__ == "__main__":
    if FAULT == "file_events":
        kill_at_file_event(int(COUNT))
    main.JOBS["train"] = "survival_process"
    main.main()
