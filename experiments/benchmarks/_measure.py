"""What the benchmarks share: two threads, ahead-of-time compilation, a timer, one process and one JSON line a case.

Import it before jax: it says how many cores may be used.

Fields of a line: name, median_ms, min_ms, runs, times_ms (what is timed never includes compilation), compile_s,
peak_rss_mb (of the whole process, compilation included) and run_rss_mb (resident after the timed runs), params, shape,
other_cores (cores that everything else on the machine used during the runs: above 0.15 the figure means little),
threads, jax, device.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

THREADS = int(os.environ.get("BENCHMARK_THREADS", "2"))
if hasattr(os, "sched_setaffinity"):  # XLA's CPU backend makes as many threads as it may use cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402


def compiled(function: Callable, *args) -> tuple[Callable, float]:
    """A jitted function compiled for these arguments, and the seconds that took."""
    start = time.perf_counter()
    program = function.lower(*args).compile()
    return program, time.perf_counter() - start


def measure(run: Callable[[], Any], runs: int, *, warmup: int = 1, inner: int = 1) -> dict[str, Any]:
    """Times `run`, which returns arrays to wait for.

    Args:
      run: what to time.
      runs: number of times reported.
      warmup: calls before the first of them.
      inner: calls to `run` in each; times are per call.

    Returns:
      The fields of the line that belong to the timing.
    """
    for _ in range(warmup):
        jax.block_until_ready(run())
    times, others = [], []
    for _ in range(runs):
        busy, own = _busy_seconds(), _own_seconds()
        start = time.perf_counter()
        for _ in range(inner):
            result = run()
        jax.block_until_ready(result)
        wall = time.perf_counter() - start
        times.append(1e3 * wall / inner)
        others.append(max(0.0, (_busy_seconds() - busy) - (_own_seconds() - own)) / wall)
    return {
        "median_ms": round(statistics.median(times), 3),
        "min_ms": round(min(times), 3),
        "runs": runs,
        "times_ms": [round(t, 3) for t in times],
        "other_cores": [round(x, 2) for x in others],
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "run_rss_mb": _resident_mb(),
    }


def count(params: Any) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def main(script: str, cases: dict[str, Callable[[int, bool], dict[str, Any]]]) -> int:
    """Runs one case, or each in a process of its own, so that peak memory belongs to the case.

    Args:
      script: `__file__` of the caller.
      cases: by name; (runs, smoke) -> fields of the line. runs = 0 stands for the case's own number, smoke for tiny
        sizes that only show that the script works.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--case", choices=list(cases), help="only this one, in this process")
    parser.add_argument("--runs", type=int, default=0, help="timed runs; 0: the case's own number")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    options = parser.parse_args()
    if options.list:
        print("\n".join(cases))
        return 0
    if options.case is None:
        rest = ["--runs", str(options.runs), *(["--smoke"] if options.smoke else [])]
        return max(subprocess.run([sys.executable, script, "--case", case, *rest]).returncode for case in cases)
    name = os.path.splitext(os.path.basename(script))[0]
    line = {"name": f"{name}/{options.case}", **cases[options.case](options.runs, options.smoke)}
    line |= {"smoke": True} if options.smoke else {}
    print(json.dumps(line | {"threads": THREADS, "jax": jax.__version__, "device": jax.devices()[0].device_kind}))
    return 0


def _busy_seconds() -> float:
    """Processor seconds of the whole machine; those of this process where the system does not say (not Linux)."""
    try:
        with open("/proc/stat") as file:
            fields = [int(x) for x in file.readline().split()[1:9]]
    except OSError:
        return _own_seconds()
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


def _resident_mb() -> int | None:
    try:
        with open("/proc/self/statm") as file:
            return round(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    except OSError:
        return None
