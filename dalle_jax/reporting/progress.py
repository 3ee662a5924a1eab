"""The progress line of a run: position, speed and remaining time; and once, early on, when the run will end."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

import jax

# The end of a run is predicted after this many steps, or after fewer if they are slow. The first step is not counted,
# unless it is very slow, because it also fills queues and caches.
_STEPS, _SECONDS, _SLOW_STEP = 10, 5.0, 20.0
_DAY = 24 * 3600
_FAR = 365 * _DAY  # beyond it no date is given


class Progress:
    """Prints the position of a run, its speed and the remaining time. Only the first host prints.

    On a terminal the line is rewritten in place. Elsewhere (a log file, a notebook) a new line is printed at most
    every `interval` seconds. Time inside `pause()` (evaluation, checkpoints) does not count as training time.

    Attributes:
      pauses: seconds that all pauses of the run will take, if known; for `predict`.
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
        self._pause_began: float | None = None  # while one lasts
        self._began = time.perf_counter()
        self._mark = (start, 0.0)
        self._shown = 0.0
        self._open = False  # whether a line on the terminal has no end yet
        self._first: float | None = None  # time of the first step, until the end of the run was predicted
        self._predicted = False
        self.pauses: float | None = None

    def _elapsed(self) -> float:
        now = time.perf_counter() if self._pause_began is None else self._pause_began
        return now - self._began - self._paused

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of the block from the training time."""
        self._pause_began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - self._pause_began
            self._pause_began = None

    def rates(self, step: int) -> dict[str, float]:
        """Returns the speed since the last call: {"seconds_per_step", "examples_per_second"}."""
        (since, then), now = self._mark, self._elapsed()
        self._mark = (step, now)
        seconds = (now - then) / max(step - since, 1)
        return {"seconds_per_step": seconds, "examples_per_second": self._batch_size / max(seconds, 1e-9)}

    def is_due(self, step: int) -> bool:
        """Returns whether `show` would print: this is the first host, and the last line is old enough."""
        return self._active and step > self._start and self._elapsed() - self._shown >= self._interval

    def show(self, step: int, loss: float) -> None:
        """Prints the progress line, unless the last one is too recent."""
        if not self.is_due(step):
            return
        self._shown = elapsed = self._elapsed()
        text = f"{self._summary(step, elapsed)} · loss {loss:.4g} · {duration(self.left(step))} left"
        self._print(f"\r\x1b[2K{text}" if self._tty else f"{text}\n")
        self._open = self._tty

    def left(self, step: int) -> float | None:
        """Returns the seconds of training that are left after step `step`; None before the first one."""
        done = step - self._start
        return (self._total - step) * self._elapsed() / done if done > 0 else None

    def predict(self, step: int) -> float | None:
        """Says once, after the first few steps, when the run will end. Call it after every step.

        Args:
          step: number of steps done.

        Returns:
          The predicted seconds until the end at the call that says it, otherwise None. Every host gets its own.
        """
        if self._predicted or step <= self._start or step >= self._total:
            return None
        elapsed, count = self._elapsed(), step - self._start - 1
        if self._first is None:
            self._first = elapsed
        if self._first >= _SLOW_STEP:
            seconds = elapsed / (count + 1)
        elif count and (count >= _STEPS or elapsed - self._first >= _SECONDS):
            seconds = (elapsed - self._first) / count
        else:
            return None
        self._predicted = True
        steps = self._total - step
        left = steps * (seconds + (self.pauses or 0.0) / (self._total - self._start))
        unknown = " (without evaluations and previews)" if self.pauses is None else ""
        self.note(f"{steps:,} more steps at {_short(seconds)}: about {duration(left)}{unknown}{until(left)}")
        return left

    def note(self, text: str) -> None:
        """Prints a separate line that stays."""
        if self._active:
            self._print(f"\r\x1b[2K{text}\n" if self._tty else f"{text}\n")
            self._open = False

    def close(self) -> None:
        """Ends a line that is still open on the terminal, so that the next message does not continue it."""
        if self._open and self._active:
            self._print("\n")
            self._open = False

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
            self.note(f"{self._summary(step, elapsed)} · {duration(elapsed)} of training ({shares})")

    def _summary(self, step: int, elapsed: float) -> str:
        seconds = elapsed / (step - self._start)
        return (
            f"train · step {step}/{self._total} · {1e3 * seconds:.0f} ms/step · "
            f"{self._batch_size / max(seconds, 1e-9):.4g} examples/s"
        )


def duration(seconds: float) -> str:
    """Returns a time span as text: "42 s", "5 min 20 s", "3 h 5 min", "12 days 7 h"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours_left = divmod(hours, 24)
    if days >= 2:
        return f"{days:,} days {hours_left} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def until(seconds: float) -> str:
    """Returns the time of day in that many seconds as text: ", until 14:32"; "" if it is very far."""
    if seconds > _FAR:
        return ""
    end = datetime.datetime.now() + datetime.timedelta(seconds=seconds)
    return f", until {end:%H:%M}" if seconds < _DAY else f", until {end:%Y-%m-%d %H:%M}"


def _short(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"
