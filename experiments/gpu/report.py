"""Prints the tables of a measurement on a GPU, as Markdown: `python experiments/gpu/report.py OUT > README.md`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

# Peaks of dense bfloat16 products in TFLOP/s, by a part of the card's name: NVIDIA's data sheets.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L4": 121.0, "RTX 4090": 165.0}


def load(folder: Path) -> dict[str, dict[str, dict]]:
    """Returns the last line of each measurement, by phase and name."""
    phases: dict[str, dict[str, dict]] = {}
    for text in (folder / "measurements.jsonl").read_text().splitlines():
        line = json.loads(text)
        phases.setdefault(line["phase"], {})[line["name"]] = line
    return phases


def table(header: tuple[str, ...], rows: list[tuple]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join("" if x is None else str(x) for x in row) + " |" for row in rows] + [""]


def number(value, digits: int = 3):
    return float(f"{value:.{digits}g}") if isinstance(value, (int, float)) else value


def trouble(line: dict) -> str | None:
    """Returns why a measurement is missing."""
    return line.get("error") or line.get("skipped")


def ratio(ours, theirs):
    return number(ours / theirs) if isinstance(ours, (int, float)) and isinstance(theirs, (int, float)) else None


def report(folder: Path) -> str:
    phases = load(folder)
    machine, peers = phases.get("machine", {}), phases.get("peers", {})
    kind = machine.get("device", {}).get("kind", "unknown device")
    peak = next((value for name, value in PEAKS.items() if name in kind), None)
    versions = ", ".join(f"{k} {v}" for k, v in machine.get("versions", {}).items() if k not in ("phase", "name", "at"))
    lines = [
        f"# Measured on one {kind}",
        "",
        f"Command: `experiments/gpu/run.sh OUT`. Versions: {versions}. All weights are random.",
        "",
        *table(
            ("Machine", "Value"),
            [
                ("card, driver, watts, clock", machine.get("driver", {}).get("text")),
                ("processor", machine.get("cpu", {}).get("model")),
                ("cores", machine.get("cpu", {}).get("cores")),
                ("copy bandwidth, GB/s", number(machine.get("copy", {}).get("gb_per_s"))),
                ("bfloat16 product, TFLOP/s", number(machine.get("bfloat16 product", {}).get("tflops"))),
                ("data sheet, TFLOP/s", peak),
            ],
        ),
    ]
    if "decoding" in phases:
        rows = []
        for name, line in phases["decoding"].items():
            torch = peers.get(name, {})
            key = "tokens_per_s" if "tokens_per_s" in line else "images_per_s"
            rows.append((
                name, number(line.get("seconds")), number(line.get("images_per_s")), number(line.get("tokens_per_s")),
                number(torch.get(key)), ratio(line.get(key), torch.get(key)), number(line.get("temporaries_gib")),
                trouble(line),
            ))  # fmt: skip
        header = ("Drawing", "s", "images/s", "tokens/s", "plain torch", "times torch", "temporaries GiB", "note")
        lines += ["MaskGIT draws in 8 steps and decodes to pixels; plain torch does not decode.", ""]
        lines += table(header, rows)
    if "training" in phases:
        rows = []
        for name, line in phases["training"].items():
            torch = peers.get(name, {})
            rate = line.get("model_tflops_per_s")
            share = f"{rate / peak:.1%}" if isinstance(rate, (int, float)) and peak else None
            rows.append((
                name, line.get("rows"), number(line.get("seconds")), number(rate), share, number(torch.get("seconds")),
                ratio(torch.get("seconds"), line.get("seconds")), number(line.get("peak_gib")), trouble(line),
            ))  # fmt: skip
        header = (
            "Training step",
            "rows",
            "s",
            "model TFLOP/s",
            "of the peak",
            "torch s",
            "times torch",
            "peak GiB",
            "note",
        )
        lines += table(header, rows)
    if "parity" in phases:
        rows = [
            (name, line.get("loss"), line.get("gradients"), line.get("equal_tokens"), line.get("pixels"), trouble(line))
            for name, line in phases["parity"].items()
        ]
        header = (
            "Against the CPU, or kernel against XLA",
            "loss, relative",
            "gradients, relative",
            "equal tokens",
            "pixels",
            "note",
        )
        lines += table(header, rows)
    if "images" in phases:
        rows = [
            (name, key, number(value))
            for name, line in phases["images"].items()
            for key, value in line.items()
            if key not in ("phase", "name", "at")
        ]
        lines += table(("Training for minutes", "what", "value"), rows)
        lines += ["![Images of the preview](samples.png)", ""]
    failed = [f"{phase}: {name}" for phase, found in phases.items() for name, line in found.items() if trouble(line)]
    lines += [f"Without a measurement: {'; '.join(failed)}." if failed else "All measurements were taken."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(report(Path(sys.argv[1])), end="")
