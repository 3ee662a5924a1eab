"""The job of `configs/evaluate.py`: measures trained priors and writes the report."""

from __future__ import annotations

from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.evaluation.measure import Model, Options, measure
from dalle_jax.evaluation.report import write
from dalle_jax.evaluation.sections import Metrics
from dalle_jax.evaluation.test_sets import Protocol, open_test_set
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.storage.files import make_workdir
from dalle_jax.text_to_image.text_to_image import TextToImage


def run(config: ConfigDict, workdir: str) -> Metrics:
    """Measures the priors of `config.model_workdir` and writes the report.

    Args:
      config: see `configs/evaluate.py`.
      workdir: the folder of the report.

    Returns:
      The contents of `report.json`.

    Raises:
      UserError: see `TextToImage.load`, `open_test_set` and `measure`.
    """
    out = make_workdir(workdir)
    folders = [folder.strip() for folder in config.model_workdir.split(",")]
    mesh = local_mesh(**config.mesh)
    loaded = [TextToImage.load(folder, config.step, config.rows_at_once, config.clip, mesh) for folder in folders]
    sampling = from_config(SamplingOptions, config.sampling, "sampling")
    kinds = [model.prior.name for model in loaded]
    names = kinds if len(set(kinds)) == len(kinds) else folders
    data = config.get("data") or workdirs.read_config(folders[0])["data"]
    protocol = Protocol(config.split, config.captions, config.count, config.seed)
    tests = open_test_set(data, protocol, loaded[0].image_size, [model.text_model for model in loaded])
    options = from_config(Options, {"seed": config.seed, **config.metrics}, "metrics")
    models = {name: Model(model, sampling) for name, model in zip(names, loaded)}
    measured = measure(models, tests, options)
    measured.metrics["protocol"]["checkpoints"] = {
        name: f"{m.workdir}, step {m.step}" for name, m in zip(names, loaded)
    }
    write(measured, tests, out, f"{', '.join(names)}: {tests.source.description}", config)
    return measured.metrics
