"""experiments/gpu: the phases at tiny sizes on a CPU, and what happens to phases that fail."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "gpu"
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

import quick_xla  # noqa: E402
import report  # noqa: E402
from recorder import Recorder  # noqa: E402


def lines(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run([shellcheck, FOLDER / "run.sh"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_phases_end_within_nine_minutes():
    limits = re.search(r"limits=\((.*)\)", (FOLDER / "run.sh").read_text())[1]
    seconds = [int(number) for number in re.findall(r"=(\d+)", limits)]
    assert len(seconds) == 6 and sum(seconds) + 2 * len(seconds) <= 540


def test_a_case_that_fails_leaves_its_error_and_the_next_one_runs(tmp_path, capsys):
    record = Recorder(tmp_path / "measurements.jsonl", "decoding", 60)

    def fails():
        raise ValueError("too large")

    record.run([("a", 1, fails), ("b", 1, lambda: {"seconds": 0.25, "rate": float("inf")})])
    first, second = lines(tmp_path / "measurements.jsonl")
    assert first["error"] == "ValueError: too large"
    assert second["seconds"] == 0.25 and second["rate"] == "inf"


def test_a_case_without_time_is_skipped_and_reported(tmp_path, capsys):
    record = Recorder(tmp_path / "measurements.jsonl", "decoding", 0)
    record.run([("maskgit", 5, lambda: {"seconds": 1.0})])
    assert "skipped" in lines(tmp_path / "measurements.jsonl")[0]
    assert "decoding: maskgit" in report.report(tmp_path).splitlines()[-1]


def test_the_report_divides_by_plain_torch(tmp_path):
    record = Recorder(tmp_path / "measurements.jsonl", "machine", 60)
    record("device", kind="NVIDIA H100 80GB HBM3")
    Recorder(tmp_path / "measurements.jsonl", "decoding", 60)("maskgit, 1 image", seconds=0.5, images_per_s=2.0)
    Recorder(tmp_path / "measurements.jsonl", "training", 60)("prior", seconds=0.5, model_tflops_per_s=494.5)
    peers = Recorder(tmp_path / "measurements.jsonl", "peers", 60)
    peers("maskgit, 1 image", seconds=1.0, images_per_s=1.0)
    peers("prior", seconds=0.75)
    text = report.report(tmp_path)
    assert re.search(r"\| maskgit, 1 image \| 0.5 \| 2.0 \|  \| 1.0 \| 2.0 \|", text)
    assert re.search(r"\| prior \|  \| 0.5 \| 494.0 \| 50.0% \| 0.75 \| 1.5 \|", text)


@pytest.mark.slow
def test_all_phases_at_tiny_sizes(tmp_path):
    environment = {**os.environ, "TINY": "1", "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    environment |= {"BENCHMARK_THREADS": "2", "XLA_FLAGS": quick_xla.flags()}
    done = subprocess.run(
        [FOLDER / "run.sh", tmp_path], env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    found = report.load(tmp_path)
    phases = {"machine", "decoding", "training", "parity", "images", "peers"}
    assert done.returncode == 0 and set(found) == phases, done.stdout + done.stderr
    without_torch = {"peers"} if "skipped" in found["peers"].get("torch", {}) else set()
    faults = [line for phase in phases - without_torch for line in found[phase].values() if report.trouble(line)]
    assert not faults, faults
    assert len(found["decoding"]) == 10 and all(line["images_per_s"] > 0 for line in found["decoding"].values())
    assert all(line["model_tflops_per_s"] > 0 for line in found["training"].values())
    # The first device is the CPU itself here, so nothing differs.
    assert {line.get("gradients", 0) for line in found["parity"].values()} == {0}
    assert {line.get("equal_tokens", 1) for line in found["parity"].values()} == {1}
    assert sum("equal_tokens" in line for line in found["parity"].values()) == 11
    assert (tmp_path / "samples.png").stat().st_size > 0
    assert "| maskgit 16x16, 1 image |" in (tmp_path / "README.md").read_text()
