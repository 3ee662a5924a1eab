"""Runs one phase of the measurements on a GPU. `run.sh` calls it; see there."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

from recorder import Recorder  # noqa: E402

PHASES = ("machine", "decoding", "training", "peers", "parity", "images")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("phase", choices=PHASES)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--seconds", required=True, type=float, help="time of the phase")
    parser.add_argument("--images", help="folder of images with captions")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script on a CPU")
    args = parser.parse_args()
    recorder = Recorder(args.output / "measurements.jsonl", args.phase, args.seconds, args.images, args.tiny)
    importlib.import_module(f"phases.{args.phase}").run(recorder)


if __name__ == "__main__":
    main()
