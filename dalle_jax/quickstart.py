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
      config: see `configs/quickstart.py`: the whole configurations of both priors (their tokenizer's included) and that
        of the evaluation.
      workdir: holds `dvae/`, `prior/`, `maskgit/`, and the results.

    Returns:
      What `report.json` holds.
    """
    start = time.perf_counter()
    out = epath.Path(workdir).expanduser()
    config = config.copy_and_resolve_references()
    tokenizer, evaluation = config.prior.tokenizer, config.evaluate
    tokenizer.workdir, config.prior.workdir = str(out / "dvae"), str(out / "prior")
    config.maskgit.workdir, config.maskgit.start_from = str(out / "maskgit"), config.prior.workdir
    resumed = (out / "dvae" / "config.json").exists()

    seconds = {}
    for name, section in (("dvae", tokenizer), ("prior", config.prior), ("maskgit", config.maskgit)):
        began = time.perf_counter()
        stages.run(section, section.workdir)
        seconds[name] = time.perf_counter() - began

    began = time.perf_counter()
    trained = workdirs.read_config(config.prior.workdir)
    examples = evaluate.read_examples(trained["data"], evaluation.split, evaluation.count)
    figures, sampling, columns = {}, {}, [("real", examples.images)]
    for section, knobs in ((config.prior, evaluation.sampling), (config.maskgit, config.maskgit_sampling)):
        model = TextToImage.load(section.workdir, rows_at_once=evaluation.rows_at_once)
        options = from_config(SamplingOptions, knobs, "sampling")
        measured, reconstructed, generated = evaluate.measure(model, examples, options, evaluation.seed)
        figures |= measured
        sampling[model.prior.name] = dataclasses.asdict(options)
        columns += [] if len(columns) > 1 else [("reconstructed", reconstructed)]
        columns.append((model.prior.name, generated))
    per_image = [figures[name]["seconds_per_image"] for name in ("autoregressive", "maskgit")]
    seconds["evaluation"] = time.perf_counter() - began
    figures |= {
        "speedup_over_autoregressive": per_image[0] / per_image[1],
        "samples": len(examples.captions),
        "split": evaluation.split,
        "sampling": sampling,
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - start,  # of this run: what an interrupted one did before is not in it
        "resumed": resumed,
        "device": f"{evaluate.device()}, {os.cpu_count()} cores, {platform.machine()}",
    }
    title = "Captions held out of training" if evaluation.split == "heldout" else evaluation.split
    report.save_png(out / "grid.png", evaluate.grid(examples, columns, title))
    report.save_json(out / "report.json", figures)
    print(f"\n{report.table(figures)}\n\n{out / 'grid.png'}\n{out / 'report.json'}")
    return figures
