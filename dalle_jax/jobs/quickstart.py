"""The job of `configs/quickstart.py`: runs all trainings in turn, then draws unseen captions and writes a report."""

from __future__ import annotations

import contextlib
import copy
import os
import platform
import time
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.ownership import owned
from dalle_jax.clip.stored import has_clip
from dalle_jax.configuration.options import from_config
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation.measure import Model, Options, measure
from dalle_jax.evaluation.report import write
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.jobs import evaluate
from dalle_jax.jobs import train as train_job
from dalle_jax.jobs.checks import prefixed
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.storage.files import check_writable, expanded
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.text_to_image import TextToImage

_STAGES = ("dvae", "prior", "maskgit", "clip")  # folders in the workdir


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains, draws and measures, and writes the report.

    Args:
      config: see `configs/quickstart.py`. It holds the whole configurations of both priors (with their tokenizer), of
        the CLIP and of the evaluation.
      workdir: holds `dvae/`, `prior/`, `maskgit/`, `clip/`, and the report.

    Returns:
      The contents of `report.json`.

    Raises:
      UserError: see `jobs.train.run` and `measure`.
    """
    out = expanded(workdir)
    with contextlib.ExitStack() as stack:
        for folder in (out, *(out / stage for stage in _STAGES)):  # all of it, until the report is written
            stack.enter_context(owned(folder))
        return _run(config, out)


def _run(config: ConfigDict, out: epath.Path) -> dict[str, Any]:
    start = time.perf_counter()
    config = check(config, str(out))
    evaluation = config.evaluate
    resumed = (out / "dvae" / "config.json").exists()

    trainings = _trainings(config)
    seconds = {}
    for name, section in trainings.items():
        began = time.perf_counter()
        train_job.run(section, section.workdir)
        seconds[name] = time.perf_counter() - began

    began = time.perf_counter()
    models, mesh, scorer = {}, local_mesh(**evaluation.mesh), ClipScorer.load(config.clip.workdir)
    for section, sampling in ((config.prior, evaluation.sampling), (config.maskgit, config.maskgit_sampling)):
        freeze_clip(scorer, section.workdir)
        model = TextToImage.load(section.workdir, rows_at_once=evaluation.rows_at_once, mesh=mesh)
        models[model.prior.name] = Model(model, from_config(SamplingOptions, sampling, "sampling"))
    data = workdirs.read_config(config.prior.workdir)["data"]
    tests = open_test_set(data, Protocol(evaluation.split, evaluation.captions, evaluation.count, evaluation.seed))
    options = from_config(Options, {"seed": evaluation.seed, **evaluation.metrics}, "metrics")
    measured = measure(models, tests, options)
    per_image = [measured.metrics[name]["seconds_per_image"] for name in ("autoregressive", "maskgit")]
    seconds["evaluation"] = time.perf_counter() - began
    measured.metrics["protocol"]["device"] += f", {os.cpu_count()} cores, {platform.machine()}"
    measured.metrics["run"] = {
        "speedup_over_autoregressive": per_image[0] / per_image[1],
        "seconds": seconds,
        "wall_seconds": time.perf_counter() - start,  # of this run; work done before an interruption is not included
        "resumed": resumed,
    }
    title = "Captions held out of training" if evaluation.split == "heldout" else evaluation.split
    write(measured, tests.captions, out, title, config, {name: section.workdir for name, section in trainings.items()})
    return measured.metrics


def _trainings(config: ConfigDict) -> dict[str, ConfigDict]:
    """Returns the configuration of each training, in order."""
    return dict(zip(_STAGES, (config.prior.tokenizer, config.prior, config.maskgit, config.clip)))


def check(config: ConfigDict, workdir: str) -> ConfigDict:
    """Rejects whatever can be rejected, in all stages, before the first training begins. Creates the workdirs.

    Args:
      config, workdir: see `run`.

    Returns:
      A copy of the configuration with the workdirs of all trainings.

    Raises:
      UserError: the first fault that is found. Its message names the key.
    """
    out = check_writable(workdir)
    config = copy.deepcopy(config)  # keeps the references to `steps`, which `minutes` sets
    config.prior.tokenizer.workdir, config.prior.workdir = str(out / "dvae"), str(out / "prior")
    config.maskgit.workdir, config.maskgit.start_from = str(out / "maskgit"), config.prior.workdir
    config.clip.workdir = str(out / "clip")
    config.clip.text.path = str(workdirs.text_model_path(config.prior.workdir))
    from_config(SamplingOptions, config.maskgit_sampling, "maskgit_sampling")
    with prefixed("evaluate."):
        evaluate.check(config.evaluate, workdir)
    ahead: list[str] = []
    for name, section in _trainings(config).items():
        try:
            train_job.check(section, section.workdir, ahead)
        except ConfigError as error:
            stage = "prior.tokenizer" if name == "dvae" else name
            raise ConfigError(f"{error} (keys of this training begin with config.{stage}.)") from error
        ahead.append(section.workdir)
    return config


def freeze_clip(scorer: ClipScorer, workdir: str) -> None:
    """Saves a CLIP into a prior's workdir, unless the same CLIP is already there.

    The workdir alone is then enough to draw the best of N. A CLIP that was trained longer replaces the older copy.

    Args:
      scorer: the CLIP.
      workdir: the workdir of a prior.
    """
    if not has_clip(workdir) or ClipScorer.load(workdir).fingerprint() != scorer.fingerprint():
        scorer.save(workdir)
