"""Prints the table of docs/speed.md: our times next to those of plain PyTorch and of OpenAI's package.

    python experiments/benchmarks/speed.py [--rounds 3] [--only "training step"]

Both sides of a row run in alternation, because the speed of a machine drifts. A value is the median over the rounds.
The last column is the range of the ratios of single rounds. A case during which other processes ran is tried again.
`peers.py` says what to install.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
_OTHERS = 0.15  # cores that other processes may use
_TRIES = 3

# task → our script and case, the peer's case, its name, and the ratio that we aim at
ROWS = {
    "sampling 1,024 tokens, batch 1": ("prior_sample.py", "b1", "torch_sample_b1", "plain torch with cache", 4),
    "sampling 1,024 tokens, batch 8": ("prior_sample.py", "b8", "torch_sample_b8", "plain torch with cache", 4),
    "training step, batch 2": ("prior_train_step.py", "row_column_b2", "torch_train_b2", "plain torch, dense", 2),
    "dVAE at 256x256, encode": ("dvae.py", "encode_256_b1", "openai_encode_256_b1", "`DALL-E` 0.1", 1.5),
    "dVAE at 256x256, decode": ("dvae.py", "decode_256_b1", "openai_decode_256_b1", "`DALL-E` 0.1", 1.5),
}


def run(script: str, case: str, rest: list[str]) -> dict:
    """Runs one case in its own process and returns its line."""
    command = [sys.executable, str(HERE / script), "--case", case, *rest]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measured(script: str, case: str, rest: list[str]) -> tuple[float, bool]:
    """Returns the milliseconds of a case, and whether the machine was quiet. A disturbed one is tried again."""
    for _ in range(_TRIES):
        line = run(script, case, rest)
        if quiet := max(line["other_cores"]) <= _OTHERS:
            break
    return line["median_ms"], quiet


def processor() -> str:
    """Returns the name of the processor and the number of cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="measure only the rows that contain this text")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to check that the script works")
    args = parser.parse_args()
    rest = ["--runs", "1", "--smoke"] if args.smoke else []
    print(f"{processor()}, {args.rounds} rounds, `python experiments/benchmarks/speed.py`:\n", flush=True)
    print("| Task | Other side | Ours s | Other s | Times as fast | Aim | Single rounds |\n|" + "---|" * 7, flush=True)
    noisy = []
    for task, (script, case, peer, name, aim) in ROWS.items():
        if args.only not in task:
            continue
        rounds = [(measured(script, case, rest), measured("peers.py", peer, rest)) for _ in range(args.rounds)]
        ours, others = ([each[side][0] for each in rounds] for side in (0, 1))
        ratios = [other / own for own, other in zip(ours, others)]
        if not all(quiet for each in rounds for _, quiet in each):
            noisy.append(task)
        print(
            f"| {task} | {name} | {statistics.median(ours) / 1e3:.3g} | {statistics.median(others) / 1e3:.3g} "
            f"| {statistics.median(ratios):.3g} | {aim} | {min(ratios):.3g} to {max(ratios):.3g} |",
            flush=True,
        )
    for task in noisy:
        print(f"\nOther processes disturbed: {task}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
