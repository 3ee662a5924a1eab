"""The job of `configs/evaluate.py`: measures trained priors and writes the report."""

from __future__ import annotations

import os
from collections.abc import Callable

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.distributed.turns import is_first
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation.measure import Model, Options, measure
from dalle_jax.evaluation.report import write
from dalle_jax.evaluation.sections import Metrics
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.jobs.checks import check_drawing
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.storage import hub
from dalle_jax.storage.files import check_writable, expanded, is_regular_file
from dalle_jax.text_to_image.text_to_image import TextToImage
from dalle_jax.text_to_image.upsampling import check_draws_captions


def run(config: ConfigDict, workdir: str) -> Metrics:
    """Measures the priors of `config.model_workdir` and writes the report.

    Several hosts share the images and captions. Each of them loads the whole models; the first one writes.

    Args:
      config: see `configs/evaluate.py`.
      workdir: the folder of the report.

    Returns:
      The contents of `report.json`.

    Raises:
      UserError: see `check`, `TextToImage.load`, `open_test_set` and `measure`.
    """
    protocol, options, sampling, mesh = check(config, workdir)
    loaded = load_models(config, mesh)
    first = next(iter(loaded.values()))
    data = config.get("data") or workdirs.read_config(first.workdir)["data"]
    text_models = [model.text_model for model in loaded.values() if model.text_model is not None]
    tests = open_test_set(data, protocol, first.image_size, text_models)
    models = {name: Model(model, sampling) for name, model in loaded.items()}
    measured = measure(models, tests, options)
    measured.metrics["protocol"]["checkpoints"] = {name: f"{m.workdir}, step {m.step}" for name, m in loaded.items()}
    if is_first():
        write(measured, tests.captions, expanded(workdir), f"{', '.join(loaded)}: {tests.source.description}", config)
    return measured.metrics


def check(config: ConfigDict, workdir: str) -> tuple[Protocol, Options, SamplingOptions, Mesh]:
    """Rejects whatever can be rejected before a model is loaded, and creates `workdir`.

    Args:
      config: see `configs/evaluate.py`.
      workdir: the folder of the report.

    Returns:
      The choice of captions, the options of the metrics, the sampling parameters and the mesh.

    Raises:
      ConfigError: a value out of range, or a `workdir` that cannot be written.
      MeshError: the mesh does not fit the devices.
    """
    check_drawing(config)
    protocol = Protocol(config.split, config.captions, config.count, config.seed)
    options = from_config(Options, {"seed": config.seed, **config.metrics}, "metrics")
    sampling = from_config(SamplingOptions, config.sampling, "sampling")
    check_inception(options.inception)
    if "data" in config:
        from_config(DataOptions, config.data, "data")
    mesh = local_mesh(**config.mesh)
    check_writable(workdir)
    return protocol, options, sampling, mesh


def check_inception(path: str | None) -> None:
    """Raises a ConfigError if the weights of Inception-v3 are given and no file or folder."""
    if path and not is_regular_file(path) and not os.path.isdir(path):
        raise ConfigError(f"config.metrics.inception={path!r} is no file; expected the weights of Inception-v3.")


def load_models(config: ConfigDict, mesh: Mesh) -> dict[str, TextToImage]:
    """Loads the priors of `config.model_workdir`, by their kinds, or by their workdirs if two are of one kind."""
    folders = split_folders(config.model_workdir)
    loaded = [TextToImage.load(folder, config.step, config.rows_at_once, config.clip, mesh) for folder in folders]
    for model in loaded:
        check_draws_captions(model)
    kinds = [model.prior.name for model in loaded]
    return dict(zip(kinds if len(set(kinds)) == len(kinds) else folders, loaded))


def _is_workdir(name: str) -> bool:
    return hub.is_repository(name) or workdirs.has_config(name)


def split_folders(text: str, is_workdir: Callable[[str], bool] = _is_workdir) -> list[str]:
    """Splits names at commas, but not at those in the name of an existing workdir: the longest name counts."""
    parts, folders = text.split(","), []
    while parts:
        names = [(count, ",".join(parts[:count])) for count in range(len(parts), 0, -1)]
        names = [(count, each) for count, name in names for each in dict.fromkeys((name, name.strip()))]
        count, name = next((found for found in names if is_workdir(found[1])), names[-1])
        folders.append(name)
        parts = parts[count:]
    return folders
