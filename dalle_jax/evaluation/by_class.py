"""Measures class-conditional priors as the papers do on ImageNet: FID, Inception score, precision and recall.

A prior draws the same number of images of each class, 50,000 in all. They are compared with the statistics that ADM
published, or with any real images (`reference.py`). Image i has class i mod V, so that the ten parts of the Inception
score see all classes. Image j of a class is number j of `TextToImage.generate` with the same seed.

The metrics have these names in `report.json`, for each prior:

    fid, inception_score, inception_score_std, precision_inception, recall_inception     with Inception's weights
    fid_clip, precision_clip, recall_clip                                                with a CLIP
    classifier_accuracy_F       a linear classifier on the features F of the samples, tested on the real images
    seconds_per_image, steps

The classification accuracy score of the papers trains ResNet-50 on the pixels of samples (arXiv 1905.10887). The linear
classifier here is much cheaper, and its values are not comparable with published ones. There is no sFID.

    P real images    V classes    B rows of a batch
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np

from dalle_jax.configuration.options import check
from dalle_jax.distributed.exchange import from_all_hosts, share
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation import feature_extractors
from dalle_jax.evaluation.feature_extractors import FeatureExtractor, ImageSet
from dalle_jax.evaluation.measure import Measured, Model, device, shared_scorer
from dalle_jax.evaluation.reference import Reference
from dalle_jax.evaluation.sections import SHOWN, Metrics, check_share, shared_batches
from dalle_jax.metrics import linear_classifier
from dalle_jax.models import inception
from dalle_jax.pytree import fingerprint
from dalle_jax.text_to_image import drawing
from dalle_jax.text_to_image.text_to_image import TextToImage


@dataclasses.dataclass(frozen=True)
class ClassProtocol:
    """Which images are drawn, and with which they are compared.

    Attributes:
      count: number of images of a prior, over all classes.
      reference: an npz file of reference statistics or a folder of real images; None for the model's own data.
      split: split of the model's own data.
      seed: of the samples.
    """

    count: int = 50_000
    reference: str | None = None
    split: str = "validation"
    seed: int = 0

    def __post_init__(self):
        check(self, "", positive=["count"], seeds=["seed"], most={"count": drawing.MOST_IMAGES})


@dataclasses.dataclass(frozen=True)
class ClassMetrics:
    """Options of the metrics.

    Attributes:
      inception: the file of Inception's weights, or None to measure with a CLIP alone.
      inception_resize: a key of `models.inception.RESIZES`.
      classifier: whether to train a linear classifier on the samples and test it on the real images.
    """

    inception: str | None = None
    inception_resize: str = "bilinear_tf1"
    classifier: bool = False

    def __post_init__(self):
        check(self, "metrics", choices={"inception_resize": inception.RESIZES})


def class_count(model: TextToImage) -> int:
    """Returns V.

    Raises:
      ConfigError: the prior draws something else than classes.
    """
    if model.prior.layout.condition.name != "label":
        raise ConfigError(
            f"{model.workdir or 'The prior'} draws from the condition {model.prior.layout.condition.name!r}, and this "
            "evaluation draws classes: give a prior of config.data.condition=label, or use configs/evaluate.py:own."
        )
    return model.text_model.vocab_size


def measure_classes(
    models: Mapping[str, Model], protocol: ClassProtocol, options: ClassMetrics, reference: Reference
) -> Measured:
    """Measures class-conditional priors. All checks come before the first measurement.

    Args:
      models: the priors, by their names in the report. They have the same classes.
      protocol: the number of images and the seed.
      options: the metrics.
      reference: the real images.

    Returns:
      The metrics, and the columns of the grid: one image of each of the first classes.

    Raises:
      ConfigError: a prior without classes or with sampling parameters that it does not have, fewer images than hosts,
        or neither Inception's weights nor a CLIP.
      DataError: too few images.
      PretrainedError: Inception's weights cannot be read.
    """
    for each in models.values():
        class_count(each.model)
        each.model.prior.check_sampling(each.sampling)
    check_share({"config.count": protocol.count})
    first = next(iter(models.values())).model
    extractors = _extractors(models, options, reference)
    if options.classifier and reference.labels is None:
        raise ConfigError(
            f"config.metrics.classifier needs the classes of real images, which {reference.description} does not have: "
            "leave config.reference out, or give a folder of class folders."
        )
    real = _real_set(reference, extractors, first.rows_at_once)
    metrics, columns = {}, []
    for name, each in models.items():
        metrics[name], shown = _measure_prior(each, protocol, extractors, reference, real, options.classifier)
        columns.append((name, shown))
    metrics["protocol"] = {
        "captions": f"{protocol.count} images of {class_count(first)} classes, balanced",
        "data": reference.description,
        "real_images": reference.count,
        "stored_statistics": reference.statistics is not None,
        "seed": protocol.seed,
        "weights": {
            "tokenizer": fingerprint(first.tokenizer_params),
            **{name: each.model.fingerprint() for name, each in models.items()},
            **{key: value for extractor in extractors for key, value in extractor.description.items()},
        },
        "sampling": {name: dataclasses.asdict(each.sampling) for name, each in models.items()},
        "device": device(first.mesh),
    }
    return Measured(metrics, columns, {name: each.model.workdir for name, each in models.items()})


def _extractors(models: Mapping[str, Model], options: ClassMetrics, reference: Reference) -> list[FeatureExtractor]:
    """Loads the feature extractors."""
    first, scorer = next(iter(models.values())).model, shared_scorer(models)
    found: list[FeatureExtractor] = []
    if options.inception:
        found.append(
            feature_extractors.inception(options.inception, options.inception_resize, first.rows_at_once, first.mesh)
        )
    if scorer is not None and reference.count:
        found.append(feature_extractors.clip(scorer))
    if not found:
        raise ConfigError(
            "There is nothing to measure with: set --config.metrics.inception=FILE, the weights of Inception-v3, or "
            "--config.clip=DIR, a CLIP that sees the real images."
        )
    return found


def _real_set(reference: Reference, extractors: Sequence[FeatureExtractor], size: int) -> ImageSet:
    """Returns the statistics of the real images. Stored statistics of Inception take the place of computed ones."""
    mine = share(reference.count)
    real = ImageSet(extractors, reference.count, part=mine)
    for images in reference.batches(mine, size):
        real.add(images)
    real = real.of_all_hosts()
    return real if reference.statistics is None else real.with_statistics(reference.statistics)


def _measure_prior(
    measured: Model,
    protocol: ClassProtocol,
    extractors: Sequence[FeatureExtractor],
    reference: Reference,
    real: ImageSet,
    classifier: bool,
) -> tuple[Metrics, np.ndarray]:
    """Draws the images of a prior, and compares them. Returns the metrics and the first images."""
    model, classes = measured.model, class_count(measured.model)
    text = model.encode_text([f"class: {number}" for number in range(classes)])
    mine, batches = shared_batches(protocol.count, model.rows_at_once)
    drawn, shown, seconds = ImageSet(extractors, protocol.count, part=mine), [], 0.0
    _draw(measured, text, batches[0][0], protocol.seed)  # compiles
    for places, valid in batches:
        start = time.perf_counter()
        images = _draw(measured, text, places, protocol.seed)
        seconds += time.perf_counter() - start
        drawn.add(images[valid])
        if sum(map(len, shown)) < SHOWN:
            shown.append(images[valid])
    drawn = drawn.of_all_hosts()
    parts = from_all_hosts({"shown": np.concatenate(shown)[:SHOWN], "seconds": np.array(seconds)})
    metrics = {
        **drawn.distances(real),
        **(drawn.precision_recall(real) if reference.count else {}),
        "steps": model.prior.decoding_steps(measured.sampling.steps),
        "seconds_per_image": float(sum(part["seconds"] for part in parts)) / protocol.count,
    }
    if classifier:
        labels = np.arange(protocol.count) % classes
        for name in [extractor.name for extractor in extractors]:
            found = linear_classifier.accuracy(
                drawn.features(name), labels, real.features(name), reference.labels, seed=protocol.seed
            )
            metrics[f"classifier_accuracy_{name}"] = found.accuracy
    return metrics, np.concatenate([part["shown"] for part in parts])[:SHOWN]


def _draw(measured: Model, text: np.ndarray, places: np.ndarray, seed: int) -> np.ndarray:
    """Draws the images at some places, uint8 [B, H, W, 3]: their classes in turn.

    Args:
      measured: the prior and its sampling parameters.
      text: the condition of each class, [V, ...].
      places: int [B].
      seed: of the samples.
    """
    rows = text[places % len(text)]
    keys = drawing.row_keys(seed, rows, places // len(text))
    return measured.model.decode(np.asarray(drawing.sample(measured.model, rows, keys, measured.sampling, None)))
