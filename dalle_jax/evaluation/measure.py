"""Measures of trained priors: tokenizer, likelihood, what their pictures show and how real they look, the best of N.

Figures stand under these names in `report.json`:

    clip            retrieval@1 among 64, of the CLIP that judges
    dvae            psnr, ssim, codebook_usage, codebook_perplexity, and what follows of its reconstructions
    <prior>         image_nats_per_token, steps, seconds_per_image, and what follows of one picture for each caption
      fid, inception_score, precision_inception, recall_inception     with Inception's weights; "rfid" of dvae
      fid_clip, precision_clip, recall_clip, clip_score               with a CLIP
      caption_accuracy, attribute_accuracy, by_attribute              on the embedded shapes
    best_of         of each prior and N: the same of the best of N by CLIP
    blur            of each set of pictures and radius: FID and Inception score after a blur of both sides
    protocol        what another implementation has to take to measure the same

    C captions    P real pictures    H, W their size    N candidates
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dalle_jax.distributed.chunks import batches
from dalle_jax.distributed.rows import over_rows
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation import feature_extractors as looks
from dalle_jax.evaluation.feature_extractors import Judge, PictureSet
from dalle_jax.evaluation.test_sets import TestSet
from dalle_jax.metrics import blur, clip_score, codebook, image_quality, shapes
from dalle_jax.metrics.retrieval import retrieval
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.pytree import fingerprint
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.text_to_image import TextToImage

Figures = dict[str, Any]


_SHOWN = 16  # rows of the grid


@dataclasses.dataclass(frozen=True)
class Model:
    """What is measured: a prior with its tokenizer, and how samples are drawn."""

    model: TextToImage
    sampling: SamplingOptions


@dataclasses.dataclass(frozen=True)
class Options:
    """How it is measured.

    Attributes:
      seed: of the samples.
      blur: radii, pixels.
      candidates: N, the most of which CLIP chooses the best; 0: no such sweep.
      candidate_captions: of how many captions, the first ones.
      inception: the file of Inception's weights; None: without FID and Inception score.
      inception_resize: a key of `models.inception.RESIZES`.
    """

    seed: int = 0
    blur: tuple[float, ...] = blur.RADII
    candidates: int = 0
    candidate_captions: int = 128
    inception: str | None = None
    inception_resize: str = "bilinear_tf1"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
      figures: see the module.
      columns: heading and pictures, uint8 [up to 16, H, W, 3], for the grid.
    """

    figures: Figures
    columns: list[tuple[str, np.ndarray]]


def measure(models: Mapping[str, Model], tests: TestSet, options: Options) -> Measured:
    """All figures of priors that share one image tokenizer.

    Args:
      models: by the name that they have in the report. The first one's CLIP judges.
      tests: captions and pictures that none of them was trained on.
      options: how.

    Raises:
      ConfigError: tokenizers that differ, or candidates without a CLIP.
      PretrainedError: Inception's weights cannot be read.
    """
    first = next(iter(models.values())).model
    scorer = first.scorer
    if len({fingerprint(each.model.tokenizer_params) for each in models.values()}) > 1:
        raise ConfigError("The priors have different image tokenizers: measure them one by one.")
    if options.candidates and scorer is None:
        raise ConfigError(
            f"config.metrics.candidates={options.candidates}: the best of them is chosen by a CLIP. Give "
            "--config.clip=DIR, the workdir of configs/clip.py or a folder that dalle_jax.pretrained.clip wrote, or "
            "--config.metrics.candidates=0."
        )
    judges: list[Judge] = []
    if options.inception:
        judges.append(looks.inception(options.inception, options.inception_resize, first.rows_at_once, first.mesh))
    if scorer is not None:
        judges.append(looks.clip(scorer))
    shown = tests.images(tests.owners[:_SHOWN])
    tokens, real, reconstructed, of_tokenizer = _tokenizer(first, tests, judges, options)
    figures: Figures = {} if scorer is None else {"clip": _retrieval(scorer, tests, real)}
    figures["dvae"] = of_tokenizer
    columns = [("real", shown), ("reconstructed", first.decode(tokens[tests.owners[:_SHOWN]]))]
    sets, best_of = {}, {}
    for name, each in models.items():
        sets[name], figures[name], drawn = _prior(each, tests, tokens, real, scorer, judges, options)
        columns.append((name, drawn))
        if options.candidates:
            best_of[name], best = _candidates(each, tests, real, judges, options)
            columns.append((f"best of {options.candidates}", best))
    if best_of:
        figures["best_of"] = best_of
    if judges:
        figures["blur"] = {
            name: {f"{radius:g}": drawn.distances(real, radius) for radius in real.radii}
            for name, drawn in {**sets, "reconstructed": reconstructed}.items()
        }
    figures["protocol"] = {
        **tests.describe(),
        "seed": options.seed,
        "samples_per_caption": 1,
        **({"candidate_captions": min(options.candidate_captions, len(tests.captions))} if best_of else {}),
        "weights": {
            "tokenizer": fingerprint(first.tokenizer_params),
            **{name: fingerprint(each.model.params) for name, each in models.items()},
            **{key: value for judge in judges for key, value in judge.description.items()},
        },
        "sampling": {name: dataclasses.asdict(each.sampling) for name, each in models.items()},
        "device": device(first.mesh),
    }
    return Measured(figures, columns)


def _retrieval(scorer: ClipScorer, tests: TestSet, real: PictureSet) -> Figures:
    """Of the test set's captions and their pictures."""
    captions = scorer.text_features(tests.captions)
    return retrieval(real.features("clip")[tests.owners], captions, scorer.encode_text(tests.captions))


def _tokenizer(model: TextToImage, tests: TestSet, judges: Sequence[Judge], options: Options):
    """Tokens of all real pictures, int32 [P, N]; those and the reconstructed ones as judges see them; figures."""
    count = len(tests.pictures)
    real, shown = (PictureSet(judges, count, options.blur) for _ in range(2))
    tokens, quality, right = [], image_quality.empty(), []
    scenes = None if tests.scenes is None else [tests.scenes[i] for i in _first_captions(tests)]
    for places, valid in batches(count, min(model.rows_at_once, count)):
        images = tests.images(places)
        codes = model.encode(images)
        reconstructed = model.decode(codes)
        quality = image_quality.add(quality, images, reconstructed, valid)
        real.add(images[valid])
        shown.add(reconstructed[valid])
        tokens.append(codes[valid])
        if scenes is not None:
            right.append(shapes.right_captions(reconstructed[valid], [scenes[i] for i in places[valid]]))
    tokens = np.concatenate(tokens)
    used = codebook.count(jnp.asarray(tokens), model.tokenizer.vocab_size)
    figures = {
        **image_quality.compute(quality),
        "codebook_perplexity": float(codebook.perplexity(used)),
        "codebook_usage": float(codebook.usage(used)),
        **({"caption_accuracy": float(np.concatenate(right).mean())} if right else {}),
        **{f"r{name}" if name.startswith("fid") else name: value for name, value in shown.distances(real).items()},
        **shown.precision_recall(real),
    }
    return tokens, real, shown, figures


def _first_captions(tests: TestSet) -> np.ndarray:
    """The first caption of each picture, int [P]."""
    return np.unique(tests.owners, return_index=True)[1]


def _prior(each: Model, tests: TestSet, tokens: np.ndarray, real: PictureSet, scorer, judges, options: Options):
    """One sample for each caption: as judges see them, figures, and the first pictures."""
    model, knobs, count = each.model, dataclasses.asdict(each.sampling), len(tests.captions)
    drawn, text = PictureSet(judges, count, options.blur), model.encode_text(tests.captions)
    nats, seconds, kept = 0.0, 0.0, []
    model.generate(tests.captions[:1] * min(count, model.rows_at_once), seed=options.seed, **knobs)  # compiles
    for places, valid in batches(count, min(model.rows_at_once, count)):
        codes = tokens[tests.owners[places]]
        loss = functools.partial(_nats, model.prior, model.params)
        nats += valid.sum() * float(over_rows(model.mesh, loss, text[places], codes, valid))
        captions, start = [tests.captions[i] for i in places], time.perf_counter()
        images = model.generate(captions, seed=options.seed, **knobs)[:, 0]
        seconds += time.perf_counter() - start
        drawn.add(images[valid])
        if tests.scenes is not None or not kept:
            kept.append(images[valid])
    kept = np.concatenate(kept)
    whole, parts = {}, {}
    if tests.scenes is not None:
        parts = shapes.score(kept, tests.scenes)
        whole = {name: parts.pop(name) for name in ("caption_accuracy", "attribute_accuracy")}
    figures = {
        **whole,
        "image_nats_per_token": nats / count,
        **({} if scorer is None else _clip_score(scorer, drawn, tests)),
        **drawn.distances(real),
        **drawn.precision_recall(real),
        "steps": model.prior.decoding_steps(each.sampling.steps),
        "seconds_per_image": seconds / count,
        **({"by_attribute": parts} if parts else {}),
    }
    return drawn, figures, kept[:_SHOWN]


def _clip_score(scorer: ClipScorer, drawn: PictureSet, tests: TestSet) -> Figures:
    """Of one picture for each caption, as the judge "clip" saw it."""
    cosines = np.sum(drawn.features("clip") * scorer.text_features(tests.captions), axis=1)
    return clip_score.compute(clip_score.add(clip_score.empty(), cosines))


@jax.jit(static_argnums=0)
def _nats(prior, params, text, tokens, valid) -> jax.Array:
    _, scalars = prior.loss(params, text, tokens, jax.random.key(0), train=False, valid=valid)
    return scalars["image_nats"]


def _candidates(each: Model, tests: TestSet, real: PictureSet, judges, options: Options):
    """The best of 1, 2, 4, … N candidates by CLIP, of the first captions.

    CLIP score and caption accuracy are over all disjoint groups of so many candidates, FID over the first group, one
    picture for each caption whatever the number.

    Returns:
      Figures by number of candidates, and the first captions' best of N.
    """
    model, knobs, n = each.model, dataclasses.asdict(each.sampling), options.candidates
    count = min(options.candidate_captions, len(tests.captions))
    numbers = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    sets = {number: PictureSet(judges, count) for number in numbers}
    scores, right, shown = [], [], []
    for start in range(0, count, per_go := max(1, model.rows_at_once // n)):
        rows = range(start, min(start + per_go, count))
        ranked = model.best_of([tests.captions[i] for i in rows], n, keep=n, seed=options.seed, **knobs)
        for number, drawn in sets.items():
            drawn.add(ranked.best_of_first(number).images[:, 0])
        drawn_order = np.argsort(ranked.numbers, axis=1)
        scores.append(np.take_along_axis(ranked.scores, drawn_order, axis=1))
        shown += [ranked.images[:, 0]] if start < _SHOWN else []
        if tests.scenes is not None:
            images = ranked.images.reshape(-1, *ranked.images.shape[2:])
            verdicts = shapes.right_captions(images, [tests.scenes[i] for i in rows for _ in range(n)])
            right.append(np.take_along_axis(verdicts.reshape(ranked.scores.shape), drawn_order, axis=1))
    scores = np.concatenate(scores)
    figures = {}
    for number, drawn in sets.items():
        best = _best_places(scores, number)
        chosen = lambda x, best=best: np.take_along_axis(x, best, axis=1)
        figures[str(number)] = {
            **({"caption_accuracy": float(chosen(np.concatenate(right)).mean())} if right else {}),
            **clip_score.compute(clip_score.add(clip_score.empty(), chosen(scores).reshape(-1))),
            **drawn.distances(real),
        }
    return figures, np.concatenate(shown)[:_SHOWN]


def _best_places(scores: np.ndarray, number: int) -> np.ndarray:
    """Of each disjoint group of `number` candidates the place of the highest score: [C, N] to int [C, N // number]."""
    groups = scores.shape[1] // number
    inside = scores[:, : groups * number].reshape(len(scores), groups, number).argmax(-1)
    return inside + number * np.arange(groups)


def device(mesh: Mesh | None) -> str:
    """What it ran on, for reports: number and kind of devices; without a mesh, the default one."""
    return f"{1 if mesh is None else mesh.size} x {jax.devices()[0].device_kind}"
