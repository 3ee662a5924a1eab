"""The job of `configs/evaluate.py:imagenet`: measures class-conditional priors and writes the report."""

from __future__ import annotations

import os

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.distributed.turns import is_first
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation.by_class import ClassMetrics, ClassProtocol, class_count, measure_classes
from dalle_jax.evaluation.measure import Model
from dalle_jax.evaluation.reference import Reference, StoredReference, read_images, read_npz
from dalle_jax.evaluation.report import write
from dalle_jax.evaluation.sections import SHOWN, Metrics
from dalle_jax.jobs.checks import check_drawing
from dalle_jax.jobs.evaluate import check_inception, load_models
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.storage.files import check_writable, expanded
from dalle_jax.text_to_image.text_to_image import TextToImage


def run(config: ConfigDict, workdir: str) -> Metrics:
    """Measures the class-conditional priors of `config.model_workdir` and writes the report.

    Several hosts share the images. Each of them loads the whole models; the first one writes.

    Args:
      config: see `configs/evaluate.py`.
      workdir: the folder of the report.

    Returns:
      The contents of `report.json`.

    Raises:
      UserError: see `check`, `TextToImage.load`, `reference_of` and `measure_classes`.
    """
    protocol, options, sampling, mesh, stored = check(config, workdir)
    loaded = load_models(config, mesh)
    models = {name: Model(model, sampling) for name, model in loaded.items()}
    counts = {name: class_count(each.model) for name, each in models.items()}
    if len(set(counts.values())) > 1:
        raise ConfigError(f"The priors have different classes: {counts}. Measure them one by one.")
    first = next(iter(loaded.values()))
    reference = stored or reference_of(first, protocol, options.classifier)
    measured = measure_classes(models, protocol, options, reference)
    measured.metrics["protocol"]["checkpoints"] = {name: f"{m.workdir}, step {m.step}" for name, m in loaded.items()}
    if is_first():
        names = [first.text_model.decode([i % counts[next(iter(counts))]]) for i in range(SHOWN)]
        write(measured, names, expanded(workdir), f"{', '.join(loaded)}: {reference.description}", config)
    return measured.metrics


def check(
    config: ConfigDict, workdir: str
) -> tuple[ClassProtocol, ClassMetrics, SamplingOptions, Mesh, StoredReference | None]:
    """Rejects whatever can be rejected before a model is loaded, and creates `workdir`.

    Returns:
      The protocol, the metrics, the sampling parameters, the mesh, and the reference statistics if a file of them is
      given.

    Raises:
      ConfigError: a value out of range, or a `workdir` that cannot be written.
      DataError: the reference is no npz file of statistics and no folder.
      MeshError: the mesh does not fit the devices.
    """
    check_drawing(config)
    protocol = ClassProtocol(config.count, config.reference, config.split, config.seed)
    options = from_config(ClassMetrics, config.metrics, "metrics")
    sampling = from_config(SamplingOptions, config.sampling, "sampling")
    check_inception(options.inception)
    mesh, stored = local_mesh(**config.mesh), None
    if protocol.reference and not os.path.isdir(os.path.expanduser(protocol.reference)):
        stored = read_npz(os.path.expanduser(protocol.reference))
    check_writable(workdir)
    return protocol, options, sampling, mesh, stored


def reference_of(model: TextToImage, protocol: ClassProtocol, labelled: bool) -> Reference:
    """Returns the real images of a folder, or of the model's own data.

    Args:
      model: its size of images, and its own data.
      protocol: names the folder, or the split of the model's data.
      labelled: whether the classes of the images are needed.

    Raises:
      DataError: see `read_images`.
    """
    split, data = protocol.split, workdirs.read_config(model.workdir)["data"]
    if protocol.reference:
        split = "all"
        data = {"source": "folder", "path": protocol.reference, "condition": "label", "caption_from": "folder_names"}
        data["fit"] = model.fit
    options = from_config(DataOptions, {**data, "image_size": model.image_size, "augment": "none"}, "data")
    return read_images(options, split, model.text_model if labelled else None)
