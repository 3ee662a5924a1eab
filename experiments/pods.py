"""Which shipped config is meant for which TPU topology, and the table of what the TPU compiler says about each.

    python experiments/pods.py --output experiments/results/compile [--only prior.py:paper]

Needs no TPU: see configs/compile.py. Tests compile from the same list.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Pod:
    """A training on a topology. A config's first one is its default: without overrides.

    Attributes:
      target: config file and variant.
      topology: see `dalle_jax.aot.topologies`.
      overrides: see `dalle_jax.aot.target`.
    """

    target: str
    topology: str
    overrides: str = ""


FULL = "model.trunk.remat=full"  # where what "dots" keeps does not fit; and where some of it does:
ATTENDED, ATTENTION = "model.trunk.remat=attended", "model.trunk.remat=attention"
PODS = (
    Pod("prior.py:paper", "v5p:4x4x8"),
    Pod("prior.py:paper", "v5e:16x16", FULL),
    Pod("prior.py:paper", "v6e:16x16", ATTENTION),
    Pod("prior.py:5.6b", "v5p:4x4x8"),
    Pod("prior.py:5.6b", "v5e:8x16", FULL),
    Pod("prior.py:5.6b", "v6e:8x16", ATTENDED),
    Pod("prior.py:2.8b", "v5p:4x4x4"),
    Pod("prior.py:2.8b", "v5e:8x16", FULL),
    Pod("prior.py:2.8b", "v6e:8x8", ATTENDED),
    Pod("maskgit.py:3b", "v5p:4x4x4"),
    Pod("maskgit.py:3b", "v5e:8x8", ATTENTION),
    Pod("maskgit.py:3b", "v6e:8x8"),
    Pod("maskgit.py:paper", "v5e:4x4"),
    Pod("maskgit.py:paper", "v5p:2x2x2", "mesh.data=2"),
    Pod("maskgit.py:paper", "v6e:2x4"),
    Pod("dvae.py:paper", "v5e:8x8"),
    Pod("dvae.py:paper", "v5p:2x4x4"),
    Pod("dvae.py:paper", "v6e:8x8"),
    Pod("clip.py:vit_b32", "v5e:16x16"),
    Pod("clip.py:vit_b32", "v5p:4x4x4"),
    Pod("clip.py:vit_b32", "v6e:8x8"),
)

COLUMNS = (
    "config", "topology", "chips", "overrides", "parameters", "batch", "state GiB", "temporaries GiB", "total GiB",
    "of GiB", "model TFLOP", "program TFLOP", "exchanged GiB", "overlapped", "kernels ms", "exposed exchange ms",
    "step ms", "utilisation", "effort", "compiled in s",
)  # fmt: skip


def row(pod: Pod, f: dict) -> dict[str, str]:
    """A line of the table from the figures of `aot.target`; all but parameters and batch are those of a chip."""
    size, seconds, gib = f["bytes"], f["seconds"], 2**30
    moved = sum(one["bytes"] for one in f["collectives"].values())
    hidden = sum(one["bytes"] * one["overlapped"] for one in f["collectives"].values())
    state = size["parameters"] + size["average"] + size["optimizer"]
    values = (
        pod.target, pod.topology, f["chips"], f["overrides"], f"{f['parameters']:,}", f["rows"], f"{state / gib:.2f}",
        f"{size['temporaries'] / gib:.2f}", f"{size['total'] / gib:.2f}", f"{size['memory'] / gib:.0f}",
        f"{f['flops']['model'] / 1e12:.1f}", f"{f['flops']['program'] / 1e12:.1f}", f"{moved / gib:.1f}",
        f"{hidden / moved:.0%}" if moved else "", f"{seconds['kernels'] * 1e3:.0f}",
        f"{seconds['exchange_exposed'] * 1e3:.0f}", f"{seconds['step'] * 1e3:.0f}", f"{f['utilisation']:.1%}",
        f["effort"], f"{f['compile_seconds']:.0f}",
    )  # fmt: skip
    return dict(zip(COLUMNS, map(str, values)))


def figures_of(pod: Pod, effort: str) -> dict:
    """What the compiler says, asked in a process of its own: each compilation leaves a gigabyte behind in its process.

    Args:
      pod: what to compile for what.
      effort: see configs/compile.py.

    Returns:
      The figures of `dalle_jax.aot.target`.

    Raises:
      RuntimeError: with the last lines that it printed, where it does not compile or does not fit.
    """
    # What tests set for their own process would be another program.
    others = {key: value for key, value in os.environ.items() if not key.startswith(("JAX_", "XLA_"))}
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "dalle_jax.main", "--config=configs/compile.py", f"--workdir={folder}",
            f"--config.target=configs/{pod.target}", f"--config.topology={pod.topology}",
            f"--config.overrides={pod.overrides}", f"--config.effort={effort}",
        ]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, env={**others, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, errors="replace"
        )
        if done.returncode:
            raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-5:]))
        return json.loads((Path(folder) / "compile.json").read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, help="folder of compile.csv, compile.md and one JSON each")
    parser.add_argument("--only", default="", help="targets that contain this")
    parser.add_argument("--topology", default="", help="topologies that contain this")
    parser.add_argument("--effort", default="full", help="see configs/compile.py")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for pod in PODS:
        if arguments.only not in pod.target or arguments.topology not in pod.topology:
            continue
        try:
            figures = figures_of(pod, arguments.effort)
        except RuntimeError as error:
            print(f"{pod.target} on {pod.topology}: {error}")
            failed += 1
            continue
        print(f"{pod.target} on {pod.topology}: {figures['utilisation']:.1%} of the peak", flush=True)
        (output / f"{name(pod)}.json").write_text(json.dumps(figures, indent=2) + "\n")
    write(output)
    return 1 if failed else 0


def name(pod: Pod) -> str:
    return "-".join([pod.target, pod.topology]).replace(":", "-").replace(".py", "")


def write(output: Path) -> None:
    """The table of all that is there, as CSV and Markdown."""
    there = [(pod, output / f"{name(pod)}.json") for pod in PODS]
    found = [(pod, json.loads(path.read_text())) for pod, path in there if path.exists()]
    rows = [row(pod, figures) for pod, figures in found]
    versions = {f"{name} {version}" for _, figures in found for name, version in figures["versions"].items()}
    with open(output / "compile.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "# Every config that is meant for pods, by the TPU compiler",
        "",
        f"`python experiments/pods.py --output DIR` wrote this ({', '.join(sorted(versions))}); no TPU was "
        "there. Each row is the update that `dalle_jax/training/loop.py` runs; with low effort (`--effort low`) the "
        "compiler overlaps no exchange, and needs up to an eighth less memory. `dalle_jax/aot/costs.py` says what the "
        "roofline counts.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(one.values()) + " |" for one in rows]
    (output / "compile.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
