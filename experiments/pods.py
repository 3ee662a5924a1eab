"""Compiles the shipped configs for their TPU topologies and writes a table of their costs.

    python experiments/pods.py --output experiments/results/compile [--only prior.py:paper]

It needs no TPU, see configs/compile.py. The tests use the same list.
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
    """A training on a topology. The first one of a config is its default and has no overrides.

    Attributes:
      target: config file and variant.
      topology: name of a topology, see `dalle_jax.aot.topologies`.
      overrides: changed keys, see `dalle_jax.aot.target.CompileOptions`.
    """

    target: str
    topology: str
    overrides: str = ""


# For chips that cannot keep what "dots" keeps: keep nothing, or some of it.
FULL = "model.trunk.remat=full"
ATTENDED = "model.trunk.remat=attended"
MLP = "model.trunk.remat=mlp"
BRANCHES = "model.trunk.remat=branches"
# With attention dropout the compiler of libtpu 0.0.42.1 ends with a segmentation fault for v6e.
KERNEL = "model.trunk.attention_dropout=0.0"
PODS = (
    Pod("prior.py:paper", "v5p:4x4x8"),
    Pod("prior.py:paper", "v5e:16x16", MLP),
    Pod("prior.py:paper", "v6e:16x16", BRANCHES),
    Pod("prior.py:5.6b", "v5p:4x4x8"),
    Pod("prior.py:5.6b", "v5e:8x16", FULL),
    Pod("prior.py:5.6b", "v6e:8x16", ATTENDED),
    Pod("prior.py:2.8b", "v5p:4x4x4"),
    Pod("prior.py:2.8b", "v5e:8x16", FULL),
    Pod("prior.py:2.8b", "v6e:8x8", FULL),
    Pod("maskgit.py:3b", "v5p:4x4x4"),
    Pod("maskgit.py:3b", "v5e:8x8", ATTENDED),
    Pod("maskgit.py:3b", "v6e:8x8"),
    Pod("maskgit.py:paper", "v5e:4x4"),
    Pod("maskgit.py:paper", "v5p:2x2x2", "mesh.data=2"),
    Pod("maskgit.py:paper", "v6e:2x4", KERNEL),
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
    """Formats the costs of a pod as a row of the table. All numbers but parameters and batch are per chip."""
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


def costs_of(pod: Pod, effort: str) -> dict:
    """Compiles a pod in a separate process, because each compilation leaks a gigabyte.

    Args:
      pod: the training and its topology.
      effort: see configs/compile.py.

    Returns:
      The costs, see `dalle_jax.aot.compiler.compile_target`.

    Raises:
      RuntimeError: it does not compile or does not fit. The message holds the last lines of the output.
    """
    # Settings of tests would change the program.
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
    parser.add_argument("--output", required=True, help="folder for compile.csv, compile.md and one JSON file per pod")
    parser.add_argument("--only", default="", help="compile only targets that contain this text")
    parser.add_argument("--topology", default="", help="compile only topologies that contain this text")
    parser.add_argument("--effort", default="full", help="see configs/compile.py")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    failed = 0
    for pod in PODS:
        if arguments.only not in pod.target or arguments.topology not in pod.topology:
            continue
        try:
            costs = costs_of(pod, arguments.effort)
        except RuntimeError as error:
            print(f"{pod.target} on {pod.topology}: {error}")
            failed += 1
            continue
        print(f"{pod.target} on {pod.topology}: {costs['utilisation']:.1%} of the peak", flush=True)
        (output / f"{name(pod)}.json").write_text(json.dumps(costs, indent=2) + "\n")
    write(output)
    return 1 if failed else 0


def name(pod: Pod) -> str:
    """Returns the name of the JSON file of a pod, without ending."""
    return "-".join([pod.target, pod.topology]).replace(":", "-").replace(".py", "")


def write(output: Path) -> None:
    """Writes the table of all JSON files of a folder, as CSV and Markdown."""
    files = [(pod, output / f"{name(pod)}.json") for pod in PODS]
    found = [(pod, json.loads(path.read_text())) for pod, path in files if path.exists()]
    rows = [row(pod, costs) for pod, costs in found]
    versions = {f"{name} {version}" for _, costs in found for name, version in costs["versions"].items()}
    with open(output / "compile.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        "# Costs of the configs for pods, from the TPU compiler",
        "",
        f"`python experiments/pods.py --output DIR` wrote this table ({', '.join(sorted(versions))}) without a TPU. "
        "Each row is the update step of a training. With low effort (`--effort low`) the compiler overlaps no "
        "exchange, and the program needs up to an eighth less memory. `dalle_jax/aot/costs.py` defines the roofline.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += ["| " + " | ".join(one.values()) + " |" for one in rows]
    (output / "compile.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
