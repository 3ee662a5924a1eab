"""The table of speeds: every row is measured on both sides, at tiny sizes."""

import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "benchmarks" / "speed.py"


@pytest.mark.slow
def test_each_row_has_two_times_and_their_ratio():
    pytest.importorskip("torch")
    pytest.importorskip("dall_e")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--smoke", "--rounds", "1"],
        env={**os.environ, "BENCHMARK_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 5
    for _, _, ours, others, ratio, *_ in rows:
        assert float(ratio) == pytest.approx(float(others) / float(ours), rel=0.02)
