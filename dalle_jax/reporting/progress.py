"""The progress line of a run: position, speed and remaining time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import jax


class Progress:
    """Prints the position of a run, its speed and the remaining time. Only the first host prints.

    On a terminal the line is rewritten in place. Elsewhere (a log file, a notebook) a new line is printed at most
    every `interval` seconds. Time inside `pause()` (evaluation, checkpoints) does not count as training time.
    """

    def __init__(self, start: int, total: int, batch_size: int, *, interval: float = 10.0, out: TextIO | None = None):
        """Starts the clock.

        Args:
          start: number of steps done.
          total: number of steps at the end of the run.
          batch_size: examples per step.
          interval: seconds between two lines outside a terminal.
          out: the output, by default stdout.
        """
        self._out = out or sys.stdout
        self._active = jax.process_index() == 0
        self._tty = self._out.isatty()
        self._interval = 0.5 if self._tty else interval
        self._start, self._total, self._batch_size = start, total, batch_size
        self._paused = 0.0
        self._began = time.perf_counter()
        self._mark = (start, 0.0)
        self._shown = 0.0

    def _elapsed(self) -> float:
        return time.perf_counter() - self._began - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of the block from the training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def rates(self, step: int) -> dict[str, float]:
        """Returns the speed since the last call: {"seconds_per_step", "examples_per_second"}."""
        (since, then), now = self._mark, self._elapsed()
        self._mark = (step, now)
        seconds = (now - then) / max(step - since, 1)
        return {"seconds_per_step": seconds, "examples_per_second": self._batch_size / max(seconds, 1e-9)}

    def show(self, step: int, loss: float) -> None:
        """Prints the progress line, unless the last one is too recent."""
        elapsed = self._elapsed()
        if not self._active or step <= self._start or elapsed - self._shown < self._interval:
            return
        self._shown = elapsed
        left = (self._total - step) * elapsed / (step - self._start)
        text = f"{self._summary(step, elapsed)} · loss {loss:.4g} · {_duration(left)} left"
        self._print(f"\r\x1b[2K{text}" if self._tty else f"{text}\n")

    def note(self, text: str) -> None:
        """Prints a separate line that stays."""
        if self._active:
            self._print(f"\r\x1b[2K{text}\n" if self._tty else f"{text}\n")

    def _print(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except (OSError, ValueError):  # the reader is gone (Ctrl-C also ends `| tee log`); the run must still save
            self._active = False

    def finish(self, step: int, shares: str) -> None:
        """Prints the average speed of the whole run and the parts of its time (`profiling.StepClock.shares`)."""
        if step > self._start:
            elapsed = self._elapsed()
            self.note(f"{self._summary(step, elapsed)} · {_duration(elapsed)} of training ({shares})")

    def _summary(self, step: int, elapsed: float) -> str:
        seconds = elapsed / (step - self._start)
        return (
            f"step {step}/{self._total} · {1e3 * seconds:.0f} ms/step · "
            f"{self._batch_size / max(seconds, 1e-9):.4g} examples/s"
        )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"
