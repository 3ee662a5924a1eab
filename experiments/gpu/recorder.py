"""Writes measurements as they are taken, and keeps a phase within its time."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


@dataclasses.dataclass
class Recorder:
    """Appends lines of JSON to a file, one for each measurement.

    Attributes:
      path: the file.
      phase: stands in each line.
      seconds: time of the phase from now on.
      images: folder of images with captions, or None.
      tiny: whether sizes are tiny, to try the script on a CPU.
    """

    path: Path
    phase: str
    seconds: float
    images: str | None = None
    tiny: bool = False

    def __post_init__(self):
        self.began = time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds that are left of the phase."""
        return self.seconds - (time.perf_counter() - self.began)

    def __call__(self, name: str, **values: Any) -> None:
        """Writes one line: phase, name and values. Numbers that are not finite become text."""
        values = {key: _plain(value) for key, value in values.items()}
        line = {"phase": self.phase, "name": name, **values, "at": round(time.perf_counter() - self.began, 1)}
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    def run(self, cases: Iterable[tuple[str, float, Callable[[], dict[str, Any]]]]) -> None:
        """Runs cases in order. Each writes one line: its values, its error, or that no time was left.

        Args:
          cases: name, seconds that it needs at least, and function that returns the values of its line.
        """
        for name, needed, case in cases:
            if self.left < needed and not self.tiny:
                self(name, skipped=f"{self.left:.0f} s were left, it needs {needed:g}")
                continue
            try:
                self(name, **case())
            except Exception as error:  # the next case still runs
                traceback.print_exc()
                self(name, error=f"{type(error).__name__}: {error}".splitlines()[0][:300])


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def seconds(run: Callable[[], Any], least: float, calls: int = 2) -> float:
    """Returns the seconds of a call of a compiled function: the mean over enough calls.

    Args:
      run: returns arrays. The calls are queued, and the last one's arrays are awaited.
      least: seconds that the measurement takes at least.
      calls: number of calls in the first round, which is not counted.
    """
    import jax

    jax.block_until_ready(run())
    while True:
        began = time.perf_counter()
        for _ in range(calls):
            result = run()
        jax.block_until_ready(result)
        passed = time.perf_counter() - began
        if passed >= least:
            return passed / calls
        calls = max(calls + 1, math.ceil(1.2 * calls * least / max(passed, 1e-6)))


def memory_gib() -> float | None:
    """Returns the peak of the device's memory in GiB since the process began, or None if the device does not say."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 2**30 if "peak_bytes_in_use" in stats else None
