"""Shared code of the benchmarks: two threads, ahead-of-time compilation, a timer, and one process per case.

Import it before jax, because it limits the cores. Each case prints one line of JSON:

| field                               | meaning                                                                   |
|-------------------------------------|---------------------------------------------------------------------------|
| name, params, shape, threads        | the case                                                                  |
| jax, device                         | the environment                                                           |
| median_ms, min_ms, runs, times_ms   | times without compilation                                                 |
| compile_s                           | time of the compilation                                                   |
| peak_rss_mb                         | peak memory of the process, including compilation                         |
| run_rss_mb                          | resident memory after the timed runs                                      |
| other_cores                         | cores that other processes used during the runs; above 0.15, discard it   |
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
if hasattr(os, "sched_setaffinity"):  # XLA's CPU backend creates one thread per available core
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])

import jax  # noqa: E402


def compiled(function: Callable, *args) -> tuple[Callable, float]:
    """Compiles a jitted function for its arguments and returns it with the seconds of the compilation."""
    start = time.perf_counter()
    program = function.lower(*args).compile()
    return program, time.perf_counter() - start


def measure(run: Callable[[], Any], runs: int, *, warmup: int = 1, inner: int = 1) -> dict[str, Any]:
    """Times a function.

    Args:
      run: the function. It returns arrays to wait for.
      runs: number of reported times.
      warmup: number of calls before the first time.
      inner: calls per time. Times are divided by it.

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
    """Returns the number of parameters."""
    return sum(x.size for x in jax.tree.leaves(params))


def main(script: str, cases: dict[str, Callable[[int, bool], dict[str, Any]]]) -> int:
    """Runs one case, or each case in a separate process, so that peak memory belongs to the case.

    Args:
      script: `__file__` of the caller.
      cases: functions by name that map (runs, smoke) to fields of the line. runs = 0 means the default of the case,
        smoke means tiny sizes that only check the script.

    Returns:
      The exit status.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--case", choices=list(cases), help="run only this case, in this process")
    parser.add_argument("--runs", type=int, default=0, help="timed runs; 0: the default of the case")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
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
    """Returns the CPU seconds of the whole machine, or of this process if the system is not Linux."""
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
