"""Trains the whole chain on real images for a few minutes, as a user would, and keeps its last preview."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from recorder import Recorder

ROOT = Path(__file__).resolve().parents[3]
RESERVED = 35  # seconds for the start of processes and the end of the phase


def run(record: Recorder) -> None:
    out = record.path.parent
    minutes = max(record.left - RESERVED, 30) / 60
    if record.images:
        config = "prior.py:small"
        data = [f"--config.data.path={record.images}", "--config.data.image_size=64"]
    else:
        config, data = "prior.py:shapes", []
    length = [f"--config.minutes={minutes:.2f}"]
    if record.tiny:
        length = ["--config.steps=2", "--config.tokenizer.steps=2"]
    run_folder = out / "run"
    places = [f"--workdir={run_folder}", f"--config.tokenizer.workdir={out / 'tokenizer'}"]
    record.run([
        ("train", 40, lambda: _command(f"configs/{config}", *data, *length, *places)),
        ("metrics", 0, lambda: _last_metrics(run_folder)),
        ("preview", 0, lambda: _preview(run_folder, out)),
    ])  # fmt: skip


def _command(config: str, *options: str) -> dict:
    command = [sys.executable, "-m", "dalle_jax.main", f"--config={config}", *options]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, errors="replace")
    print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {(done.stderr or done.stdout).splitlines()[-1:]}")
    return {"command": " ".join(["python", *command[1:]]).replace(str(ROOT), "."), "status": done.returncode}


def _last_metrics(workdir: Path) -> dict:
    """Returns the last metrics of each kind of a run."""
    values = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        values.update(json.loads(line))
    return {key: value for key, value in values.items() if key.startswith("eval/") or key == "step"}


def _preview(workdir: Path, out: Path) -> dict:
    """Copies the run's last preview of held-out captions to a fixed name."""
    previews = sorted((workdir / "samples").glob("*.png"), key=lambda path: path.stat().st_mtime)
    target = out / "samples.png"
    target.write_bytes(previews[-1].read_bytes())
    return {"file": target.name, "from": previews[-1].name}
