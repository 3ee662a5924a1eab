"""The progress line: where a run is, how fast it goes, and when it will end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import jax


class Progress:
    """The line that shows where a run is, how fast it goes and when it will end.

    On a terminal the line is rewritten in place; elsewhere (a log file, a notebook) a new one is printed, at most
    every `interval` seconds.  Time inside `pause()` (evaluation, checkpoints) is not counted as training time.
    """

    def __init__(self, start: int, total: int, batch_size: int, *, interval: float = 10.0, out: TextIO | None = None):
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
        """Context whose time is not training time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def rates(self, step: int) -> dict[str, float]:
        """Speed since the last call: {"seconds_per_step", "examples_per_second"}."""
        (since, then), now = self._mark, self._elapsed()
        self._mark = (step, now)
        seconds = (now - then) / max(step - since, 1)
        return {"seconds_per_step": seconds, "examples_per_second": self._batch_size / max(seconds, 1e-9)}

    def show(self, step: int, loss: float) -> None:
        """Shows the line, unless it was shown just before."""
        elapsed = self._elapsed()
        if not self._active or step <= self._start or elapsed - self._shown < self._interval:
            return
        self._shown = elapsed
        left = (self._total - step) * elapsed / (step - self._start)
        text = f"{self._summary(step, elapsed)} · loss {loss:.4g} · {_duration(left)} left"
        self._print(f"\r\x1b[2K{text}" if self._tty else f"{text}\n")

    def note(self, text: str) -> None:
        """Prints a line of its own."""
        if self._active:
            self._print(f"\r\x1b[2K{text}\n" if self._tty else f"{text}\n")

    def _print(self, text: str) -> None:
        try:
            self._out.write(text)
            self._out.flush()
        except (OSError, ValueError):  # nobody reads any more (a Ctrl-C ends `| tee log` too): no reason not to save
            self._active = False

    def finish(self, step: int, shares: str) -> None:
        """Prints the average speed of the whole run, and what its time went to (`profiling.StepClock.shares`)."""
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
