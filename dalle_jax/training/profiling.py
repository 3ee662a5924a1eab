"""Profiling of a training: the parts of every step's time, and on request a trace of a few steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import jax
from etils import epath

from dalle_jax.storage.files import write_errors
from dalle_jax.storage.mirror import Mirror

_WARM_UP = 3  # steps before a trace begins, because the first ones fill queues and caches


class StepClock:
    """Splits the host's time into parts.

    The host works ahead of the device. While the device computes step n, the host gets the batch of step n + 1,
    dispatches it, and only then waits for step n. The parts therefore describe the host, not the device:

    - data: waiting for the next batch (reading, decoding, sending). If it is large, the data is the bottleneck.
    - dispatch: handing the step to the device. If it is large, the step is too small, or the runtime's queue is full.
    - device: waiting for the previous step. It should be large: the device is busy, and data and dispatch are hidden.
      If it is near zero, the device waits for the host.
    - other: the rest of the loop (writing metrics, printing).

    The clock adds no synchronisation, because it measures only what the loop does anyway.
    """

    def __init__(self, start: int = 0):
        """Starts after `start` steps."""
        self._step = start
        self._seconds = dict.fromkeys(("data", "dispatch", "device"), 0.0)
        self._whole, self._wall = dict(self._seconds), 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time of the block as `name` ("data", "dispatch" or "device") and names it in a trace."""
        began = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):
                yield
        finally:
            self._seconds[name] += time.perf_counter() - began

    def take(self, step: int, seconds_per_step: float) -> dict[str, float]:
        """Returns the parts since the last call and resets them.

        Args:
          step: the last step to count.
          seconds_per_step: mean time of the host's loop per step since the last call.

        Returns:
          {"seconds_data", "seconds_dispatch", "seconds_device", "seconds_other"}, means per step. Their sum is
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
        """Returns the shares of the whole time as text: "data 3%, dispatch 1%, device 95%"."""
        return ", ".join(f"{name} {seconds / max(self._wall, 1e-9):.0%}" for name, seconds in self._whole.items())


class StepTrace:
    """Records a profile of a few steps to `<workdir>/profile`, for TensorBoard and Perfetto.

    TensorBoard finds it there with its plugin (`pip install tensorboard-plugin-profile`).  ui.perfetto.dev opens the
    file `perfetto_trace.json.gz`. The profile shows numbered steps, their parts ("data", "dispatch", "device",
    "evaluate", "preview", "checkpoint"), and the programs on the devices. Only the first host is profiled. Profiled
    steps are a little slower, and the host waits for the last one.
    """

    def __init__(self, workdir: epath.PathLike, *, start: int, total: int, count: int):
        """Plans the recording and starts nothing.

        Args:
          workdir: directory of the run.
          start: number of steps done when this process began.
          total: step at which the run ends.
          count: number of steps to record (`config.profile_steps`), 0 for none. They begin with the fourth step of this
            process, or earlier if the run ends before.
        """
        self._first = max(min(start + _WARM_UP, total - count), start)
        self._last = min(self._first + count, total)
        self._target = epath.Path(workdir) / "profile"
        self._mirror: Mirror | None = None

    def due(self, step: int) -> bool:
        """Returns whether the recording begins or ends after `step` steps. `advance` then starts or ends it."""
        enabled = jax.process_index() == 0 and self._first < self._last
        return enabled and step == (self._first if self._mirror is None else self._last)

    def advance(self) -> str:
        """Begins the recording, or ends it. The device must have computed all queued steps.

        Returns:
          A line for the user.
        """
        what = f"profile of steps {self._first + 1} to {self._last}"
        if self._mirror is not None:
            self.close()
            return f"{self._target}: {what}"
        self._mirror = Mirror(self._target)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a trace of every Python call would hide the rest
        jax.profiler.start_trace(self._mirror.folder, create_perfetto_trace=True, profiler_options=options)
        return f"{what} begins"

    def close(self) -> None:
        """Ends an active recording and writes it."""
        if self._mirror is not None:
            mirror, self._mirror = self._mirror, None
            with write_errors(self._target):
                jax.profiler.stop_trace()
                mirror.close()
