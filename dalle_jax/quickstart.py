"""The whole system in one go: every training in turn, then pictures for unseen captions, a grid and a report."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dalle_jax import evaluate, report, stages
from dalle_jax import workdir as workdirs
from dalle_jax.generate import SamplingOptions, TextToImage
from dalle_jax.options import from_config


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, generates, scores; writes `grid.png` and `report.json` and prints the table.

    Args:
      config: see `configs/quickstart.py`: the whole configuration of the prior (its tokenizer's included) and that of
        the evaluation.
      workdir: holds `dvae/`, `prior/`, and the results.

    Returns:
      What `report.json` holds.
    """
    start = time.perf_counter()
    out = epath.Path(workdir).expanduser()
    config = config.copy_and_resolve_references()
    config.prior.workdir = config.evaluate.model_workdir = str(out / "prior")
    config.prior.tokenizer.workdir = str(out / "dvae")
    resumed = (out / "dvae" / "config.json").exists()

    seconds = {}
    for name, section in (("dvae", config.prior.tokenizer), ("prior", config.prior)):
        began = time.perf_counter()
        stages.run(section, section.workdir)
        seconds[name] = time.perf_counter() - began

    began = time.perf_counter()
    model = TextToImage.load(config.prior.workdir, rows_at_once=config.evaluate.rows_at_once)
    trained = workdirs.read_config(config.prior.workdir)
    examples = evaluate.read_examples(trained["data"], config.evaluate.split, config.evaluate.count)
    options = from_config(SamplingOptions, config.evaluate.sampling, "evaluate.sampling")
    figures, reconstructed, generated = evaluate.measure(model, examples, options, config.evaluate.seed)
    seconds["evaluation"] = time.perf_counter() - began
    figures |= {
        "samples": len(examples.captions),
        "split": config.evaluate.split,
        "sampling": dataclasses.asdict(options),
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - start,  # of this run: what an interrupted one did before is not in it
        "resumed": resumed,
        "device": f"{evaluate.device()}, {os.cpu_count()} cores, {platform.machine()}",
    }
    title = "Captions held out of training" if config.evaluate.split == "heldout" else config.evaluate.split
    columns = [("real", examples.images), ("reconstructed", reconstructed), ("generated", generated)]
    report.save_png(out / "grid.png", evaluate.grid(examples, columns, title))
    report.save_json(out / "report.json", figures)
    print(f"\n{report.table(figures)}\n\n{out / 'grid.png'}\n{out / 'report.json'}")
    return figures
