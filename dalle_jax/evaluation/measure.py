"""Measures trained priors: tokenizer, likelihood, caption accuracy, image quality, and the best of N.

The metrics have these names in `report.json`:

    clip            retrieval@1 among 64, of the CLIP that ranks and scores
    dvae            psnr, ssim, codebook_usage, codebook_perplexity, and the metrics below of its reconstructions
    <prior>         image_nats_per_token, steps, seconds_per_image, and the metrics below of one image per caption
      fid, inception_score, precision_inception, recall_inception     with Inception's weights; "rfid" for dvae
      fid_clip, precision_clip, recall_clip, clip_score               with a CLIP
      caption_accuracy, attribute_accuracy, by_attribute              on the embedded shapes
    best_of         per prior and N: the same metrics of the best of N by CLIP
    blur            per set of images and radius: FID and Inception score after a blur of both sides
    protocol        the settings that another implementation needs to measure the same

    H, W image size    N candidates
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax.configuration.options import check
from dalle_jax.configuration.values import finite
from dalle_jax.distributed.turns import is_first
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation import feature_extractors
from dalle_jax.evaluation.feature_extractors import FeatureExtractor
from dalle_jax.evaluation.sections import (
    SHOWN,
    Metrics,
    check_share,
    measure_candidates,
    measure_prior,
    measure_retrieval,
    measure_tokenizer,
)
from dalle_jax.evaluation.showcase import Showcase, showcase
from dalle_jax.evaluation.test_sets import TestSet
from dalle_jax.metrics import blur
from dalle_jax.models import inception
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.pytree import fingerprint
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.text_to_image import TextToImage

_IN_SHOWCASE = 3  # captions


@dataclasses.dataclass(frozen=True)
class Model:
    """A prior with its tokenizer, and the sampling parameters that it is measured with."""

    model: TextToImage
    sampling: SamplingOptions


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of an evaluation.

    Attributes:
      seed: of the samples.
      blur: blur radii, pixels.
      candidates: N, the largest number of candidates from which CLIP chooses the best; 0 skips this section.
      candidate_captions: number of captions in that section, the first ones.
      inception: the file of Inception's weights. None skips FID and Inception score.
      inception_resize: a key of `models.inception.RESIZES`.
    """

    seed: int = 0
    blur: tuple[float, ...] = blur.RADII
    candidates: int = 0
    candidate_captions: int = 128
    inception: str | None = None
    inception_resize: str = "bilinear_tf1"

    def __post_init__(self):
        check(
            self, "metrics", at_least_0=["candidates"], positive=["candidate_captions"], seeds=["seed"],
            most={"candidates": 2**16}, choices={"inception_resize": inception.RESIZES},
        )  # fmt: skip
        for radius in self.blur:
            finite("config.metrics.blur", radius, 0, 1000)


@dataclasses.dataclass(frozen=True)
class Measured:
    """The result of an evaluation.

    Attributes:
      metrics: see the module.
      columns: columns of the grid: heading and images, uint8 [up to 16, H, W, 3].
      workdirs: of the measured priors, by their names.
      showcases: of the priors that have one, by their names; on the first host.
    """

    metrics: Metrics
    columns: list[tuple[str, np.ndarray]]
    workdirs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    showcases: Mapping[str, Showcase] = dataclasses.field(default_factory=dict)


def measure(models: Mapping[str, Model], tests: TestSet, options: Options) -> Measured:
    """Measures priors that share one image tokenizer.

    One CLIP ranks and scores all of them, so that their scores are comparable. All checks come before the first
    measurement. Several hosts share the images and captions; each of them must call it and gets the same metrics.

    Args:
      models: the priors, by their names in the report.
      tests: captions and images that none of the priors was trained on.
      options: see `Options`.

    Returns:
      The metrics, and the columns of the grid.

    Raises:
      ConfigError: different tokenizers or different CLIPs, candidates without a CLIP, more hosts than captions, or
        sampling parameters that a prior does not have.
      PretrainedError: Inception's weights cannot be read.
    """
    for each in models.values():
        each.model.prior.check_sampling(each.sampling)
    scorer = shared_scorer(models)
    if options.candidates and scorer is None:
        raise ConfigError(
            f"config.metrics.candidates={options.candidates}, but no CLIP was given to choose the best. Set "
            "--config.clip=DIR, the workdir of configs/clip.py or a folder that dalle_jax.pretrained.clip wrote, or "
            "--config.metrics.candidates=0."
        )
    models = {name: Model(dataclasses.replace(m.model, scorer=scorer), m.sampling) for name, m in models.items()}
    first = next(iter(models.values())).model
    if len({fingerprint(each.model.tokenizer_params) for each in models.values()}) > 1:
        raise ConfigError("The priors have different image tokenizers: measure them one by one.")
    counts = {"config.count": min(len(tests.captions), len(tests.indices))}
    if options.candidates:
        counts["config.metrics.candidate_captions"] = min(options.candidate_captions, len(tests.captions))
    check_share(counts)
    extractors: list[FeatureExtractor] = []
    if options.inception:
        extractors.append(
            feature_extractors.inception(options.inception, options.inception_resize, first.rows_at_once, first.mesh)
        )
    if scorer is not None:
        extractors.append(feature_extractors.clip(scorer))

    shown = tests.images(tests.owners[:SHOWN])
    tokenized = measure_tokenizer(first, tests, extractors, options.blur)
    real = tokenized.real
    metrics: Metrics = {} if scorer is None else {"clip": measure_retrieval(scorer, tests, real)}
    metrics["dvae"] = tokenized.metrics
    columns = [("real", shown), ("reconstructed", first.decode(tokenized.tokens[tests.owners[:SHOWN]]))]
    by_radius, best_of = {}, {}
    for name, each in models.items():
        drawn = measure_prior(each.model, each.sampling, tests, tokenized, extractors, options.seed)
        by_radius[name], metrics[name] = drawn.blur, drawn.metrics
        columns.append((name, drawn.first))
        if options.candidates:
            best_of[name], best = measure_candidates(
                each.model, each.sampling, tests, real, extractors, options.seed,
                options.candidates, options.candidate_captions,
            )  # fmt: skip
            columns.append((f"best of {options.candidates}", best))
    if best_of:
        metrics["best_of"] = best_of
    if extractors:
        metrics["blur"] = by_radius | {"reconstructed": tokenized.blur}
    metrics["protocol"] = _protocol(models, tests, options, extractors)
    showcases = _showcases(models, tests, options.seed) if is_first() else {}
    return Measured(metrics, columns, {name: each.model.workdir for name, each in models.items()}, showcases)


def _showcases(models: Mapping[str, Model], tests: TestSet, seed: int) -> dict[str, Showcase]:
    """Draws the showcases of the priors that have one, for the first captions."""
    captions = tests.captions[:_IN_SHOWCASE]
    images = tests.images(tests.owners[: len(captions)])
    drawn = {
        name: showcase(each.model, dataclasses.asdict(each.sampling), images, captions, seed)
        for name, each in models.items()
    }
    return {name: found for name, found in drawn.items() if found is not None}


def shared_scorer(models: Mapping[str, Model]) -> ClipScorer | None:
    """Returns the CLIP of the first model that has one, or None.

    Raises:
      ConfigError: the models have different CLIPs.
    """
    scorers = {name: each.model.scorer for name, each in models.items() if each.model.scorer is not None}
    if len({scorer.fingerprint() for scorer in scorers.values()}) > 1:
        raise ConfigError(
            f"The priors {', '.join(scorers)} hold different CLIPs, so that their scores are not comparable: set "
            "--config.clip=DIR, one CLIP for all of them."
        )
    return next(iter(scorers.values()), None)


def _protocol(
    models: Mapping[str, Model], tests: TestSet, options: Options, extractors: Sequence[FeatureExtractor]
) -> Metrics:
    """Describes how the metrics were measured."""
    first = next(iter(models.values())).model
    candidates = {"candidate_captions": min(options.candidate_captions, len(tests.captions))}
    return {
        **tests.describe(),
        "seed": options.seed,
        "samples_per_caption": 1,
        **(candidates if options.candidates else {}),
        "weights": {
            "tokenizer": fingerprint(first.tokenizer_params),
            **{name: each.model.fingerprint() for name, each in models.items()},
            **{key: value for extractor in extractors for key, value in extractor.description.items()},
        },
        "sampling": {name: dataclasses.asdict(each.sampling) for name, each in models.items()},
        "device": device(first.mesh),
    }


def device(mesh: Mesh | None) -> str:
    """Returns number and kind of the devices of a mesh, such as "1 x cpu", or "2 hosts, each 1 x cpu".

    None means the default device.
    """
    hosts = f"{jax.process_count()} hosts, each " if jax.process_count() > 1 else ""
    return f"{hosts}{1 if mesh is None else mesh.size} x {jax.local_devices()[0].device_kind}"
