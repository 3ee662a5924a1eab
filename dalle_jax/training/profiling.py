"""Where the time of a training goes: a few numbers at every step, and a trace of a few steps when asked for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax
from etils import epath

from dalle_jax.errors import ConfigError
from dalle_jax.storage.files import write_errors
from dalle_jax.storage.mirror import Mirror

_WARM_UP = 3  # steps before a trace begins: the first ones fill queues and caches


class StepClock:
    """Splits the host's time into parts.

    The host works ahead of the device: while the device computes step n, the host gets the batch of step n + 1,
    dispatches it, and only then waits for step n.  So the parts say what the host did, not what the device did:

    - data: waiting for the next batch (reading, decoding, sending it off).  Large: the data is the bottleneck.
    - dispatch: handing the step to the device.  Large: the step is too small, or the runtime's queue is full.
    - device: waiting until the step before has been computed.  Large is as it should be: the device is busy, and
      data and dispatch are hidden behind it.  Near zero, the device waits for the host.
    - other: the rest of the loop (writing metrics, printing).

    Nothing is waited for on behalf of the clock: it stops the time of what the loop does anyway.
    """

    def __init__(self, start: int = 0):
        """Starts at step `start`."""
        self._step = start
        self._seconds = dict.fromkeys(("data", "dispatch", "device"), 0.0)
        self._whole, self._wall = dict(self._seconds), 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context whose time is counted as `name` ("data", "dispatch" or "device"), and named so in a trace."""
        began = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def take(self, step: int, seconds_per_step: float) -> dict[str, float]:
        """The parts since the last call; starts anew.

        Args:
          step: the last step that is part of it.
          seconds_per_step: time of the host's loop since the last call, of one step.

        Returns:
          {"seconds_data", "seconds_dispatch", "seconds_device", "seconds_other"}, of one step; they add up to
          `seconds_per_step`.
        """
        steps = max(step - self._step, 1)
        self._step = step
        self._wall += steps * seconds_per_step
        for name, seconds in self._seconds.items():
            self._whole[name] += seconds
        parts = {f"seconds_{name}": seconds / steps for name, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return {**parts, "seconds_other": seconds_per_step - sum(parts.values())}

    def shares(self) -> str:
        """The parts of all that was taken, for people: "data 3%, dispatch 1%, device 95%"."""
        return ", ".join(f"{name} {seconds / max(self._wall, 1e-9):.0%}" for name, seconds in self._whole.items())


def check_profile_steps(count: int) -> None:
    """Raises ConfigError where `config.profile_steps` is not a number of steps."""
    if not isinstance(count, int) or count < 0:
        raise ConfigError(
            f"config.profile_steps={count!r}: expected a whole number, how many steps to record (0: none)."
        )


class StepTrace:
    """A profile of a few steps, in `<workdir>/profile`, for TensorBoard and Perfetto.

    TensorBoard finds it there (with its plugin: `pip install tensorboard-plugin-profile`), and ui.perfetto.dev opens
    its file `perfetto_trace.json.gz`.  It shows the steps by their number, what the loop does in each of them ("data",
    "dispatch", "device", "evaluate", "preview", "checkpoint"), and what runs on the devices.  Only process 0 is
    profiled.  Profiled steps are a little slower, and the last one is waited for.
    """

    def __init__(self, workdir: epath.PathLike, *, start: int, total: int, count: int):
        """Nothing is recorded yet.

        Args:
          workdir: directory of the run.
          start: number of steps done when this process began.
          total: step at which the run ends.
          count: how many steps to record (`config.profile_steps`), 0 for none; they begin with the fourth one that
            this process does, or earlier where the run ends before.
        """
        self._first = max(min(start + _WARM_UP, total - count), start)
        self._last = min(self._first + count, total)
        self._target = epath.Path(workdir) / "profile"
        self._mirror: Mirror | None = None

    def due(self, step: int) -> bool:
        """Whether the recording begins or ends when `step` steps are done; `advance` then does it."""
        wanted = jax.process_index() == 0 and self._first < self._last
        return wanted and step == (self._first if self._mirror is None else self._last)

    def advance(self) -> str:
        """Begins the recording, or ends it, when all its steps have been computed.

        Returns:
          What to tell the user.
        """
        what = f"profile of steps {self._first + 1} to {self._last}"
        if self._mirror is not None:
            self.close()
            return f"{self._target}: {what}"
        self._mirror = Mirror(self._target)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # each Python call: a large file that hides the rest
        jax.profiler.start_trace(self._mirror.folder, create_perfetto_trace=True, profiler_options=options)
        return f"{what} begins"

    def close(self) -> None:
        """Ends a recording that is under way, and writes what there is of it."""
        if self._mirror is not None:
            mirror, self._mirror = self._mirror, None
            with write_errors(self._target):
                jax.profiler.stop_trace()
                mirror.close()
