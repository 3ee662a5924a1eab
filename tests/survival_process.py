"""A real training process to do harm to: `tiny_job` behind the command line of `dalle_jax.main`.

    python tests/survival_process.py --config=tests/survival_process.py --workdir=DIR [--config.key=value ...]

It prints "logged" after every step, and does to itself what $FAULT says:

    stall:K           the data source never delivers batch K (counted from the start of the process)
    file_events:N     SIGKILL at the N-th time that a file below `checkpoints` is opened for writing, made, renamed or
                      removed
    poison:K          the loss is not a number from step K on
"""

import dataclasses
import os
import signal
import sys
import threading

sys.modules["torch"] = None  # tensorboardX would import it: half of the time that a process takes to start

import jax  # noqa: E402
from tiny_job import tiny_batches, tiny_config, tiny_job  # noqa: E402

from dalle_jax import main  # noqa: E402
from dalle_jax.train import train  # noqa: E402

FAULT, _, COUNT = os.environ.get("FAULT", "").partition(":")


def get_config():
    return tiny_config(steps=12, cadence__checkpoint=3, cadence__eval=6)


class HostRows:
    """This host's rows of another iterator's batches."""

    def __init__(self, batches):
        self._batches, self._left = batches, int(COUNT) if FAULT == "stall" else -1
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __iter__(self):
        return self

    def __next__(self):
        if self._left == 0:
            threading.Event().wait()
        self._left -= 1
        return host_rows(next(self._batches))


def host_rows(batch):
    count = jax.process_count()
    return {name: x.reshape(count, -1, *x.shape[1:])[jax.process_index()] for name, x in batch.items()}


def logged():
    print("logged", flush=True)
    return {}


def run(config, workdir):
    job = tiny_job(config, poison=range(int(COUNT), config.steps) if FAULT == "poison" else ())
    eval_batches = job.eval_batches
    state = train(
        config,
        workdir,
        dataclasses.replace(
            job,
            train_batches=lambda: HostRows(tiny_batches(config.batch_size, config.seed)),
            eval_batches=lambda: map(host_rows, eval_batches()),
            data_counts=logged,
        ),
    )
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
