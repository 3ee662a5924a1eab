"""The sections of an evaluation: image tokenizer, CLIP retrieval, prior, and the best of N.

Several hosts share the images and captions (`exchange.share`). Afterwards each of them has the metrics of all.

C captions    P real images    H, W their size    N candidates, or image tokens in `tokens`
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

from dalle_jax.distributed.chunks import batches
from dalle_jax.distributed.exchange import from_all_hosts, share
from dalle_jax.distributed.rows import over_rows
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation.feature_extractors import FeatureExtractor, ImageSet
from dalle_jax.evaluation.test_sets import TestSet
from dalle_jax.metrics import clip_score, codebook, image_quality, shapes
from dalle_jax.metrics.image_quality import ImageQuality
from dalle_jax.metrics.retrieval import retrieval
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.text_to_image import TextToImage

Metrics = dict[str, Any]

SHOWN = 16  # rows of the grid


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """The real images through the image tokenizer.

    Attributes:
      tokens: int32 [P, N].
      real: statistics of the real images.
      metrics: of the tokenizer, by name.
      blur: FID and Inception score of the reconstructions, by blur radius.
    """

    tokens: np.ndarray
    real: ImageSet
    metrics: Metrics
    blur: Mapping[str, Metrics]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One drawn image per caption.

    Attributes:
      metrics: of the prior, by name.
      blur: FID and Inception score, by blur radius.
      first: the first images, uint8 [up to 16, H, W, 3].
    """

    metrics: Metrics
    blur: Mapping[str, Metrics]
    first: np.ndarray


def check_share(counts: Mapping[str, int]) -> None:
    """Checks that each host has something of everything to measure.

    Args:
      counts: number of images or captions, by the key of the config that sets it.

    Raises:
      ConfigError: more hosts than images or captions.
    """
    hosts = jax.process_count()
    for key, count in counts.items():
        if count < hosts:
            raise ConfigError(
                f"{hosts} hosts for {count} captions or images ({key}): expected at least one for each host. Raise "
                f"{key}, or use fewer hosts (--num_processes)."
            )


def shared_batches(count: int, size: int) -> tuple[range, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns the rows of this host, and the batches of at most `size` rows in which it measures them.

    Each batch has the places of its rows among all of them, and a mask of the rows that count, as in `batches`.
    """
    mine = share(count)
    own = batches(len(mine), min(size, len(mine)))
    return mine, [(mine.start + places, valid) for places, valid in own]


def _of_all_hosts(**arrays: Any) -> dict[str, np.ndarray]:
    """Concatenates arrays [rows, ...] of all hosts."""
    parts = from_all_hosts(arrays)
    return {name: np.concatenate([part[name] for part in parts]) for name in arrays}


def measure_tokenizer(
    model: TextToImage, tests: TestSet, extractors: Sequence[FeatureExtractor], radii: Sequence[float]
) -> Tokenized:
    """Encodes and decodes all real images.

    Args:
      model: its tokenizer is measured.
      tests: the real images.
      extractors: the feature extractors.
      radii: blur radii, pixels.
    """
    count = len(tests.indices)
    mine, shared = shared_batches(count, model.rows_at_once)
    real, reconstructed = (ImageSet(extractors, count, radii, mine) for _ in range(2))
    tokens, quality, right = [], image_quality.empty(), []
    scenes = None if tests.scenes is None else [tests.scenes[i] for i in _first_captions(tests)]
    for places, valid in shared:
        images = tests.images(places)
        codes = model.encode(images)
        decoded = model.decode(codes)
        quality = image_quality.add(quality, images, decoded, valid)
        real.add(images[valid])
        reconstructed.add(decoded[valid])
        tokens.append(codes[valid])
        if scenes is not None:
            right.append(shapes.right_captions(decoded[valid], [scenes[i] for i in places[valid]]))
    real, reconstructed = real.of_all_hosts(), reconstructed.of_all_hosts()
    whole = _of_all_hosts(tokens=np.concatenate(tokens), **({"right": np.concatenate(right)} if right else {}))
    parts = from_all_hosts({name: np.asarray(value) for name, value in dataclasses.asdict(quality).items()})
    qualities = (ImageQuality(**{name: value.item() for name, value in part.items()}) for part in parts)
    used = codebook.count(jnp.asarray(whole["tokens"]), model.tokenizer.vocab_size)
    by_radius = _by_radius(reconstructed, real)
    metrics = {
        **image_quality.compute(functools.reduce(image_quality.merge, qualities)),
        "codebook_perplexity": float(codebook.perplexity(used)),
        "codebook_usage": float(codebook.usage(used)),
        **({"caption_accuracy": float(whole["right"].mean())} if right else {}),
        **{f"r{name}" if name.startswith("fid") else name: value for name, value in by_radius["0"].items()},
        **reconstructed.precision_recall(real),
    }
    return Tokenized(whole["tokens"], real, metrics, by_radius)


def _by_radius(images: ImageSet, real: ImageSet) -> dict[str, Metrics]:
    """Compares images with the real ones for each blur radius, such as "0"."""
    return {f"{radius:g}": images.distances(real, radius) for radius in real.radii}


def _first_captions(tests: TestSet) -> np.ndarray:
    """Returns the index of each image's first caption, int [P]."""
    return np.unique(tests.owners, return_index=True)[1]


def measure_retrieval(scorer: ClipScorer, tests: TestSet, real: ImageSet) -> Metrics:
    """Measures how well CLIP matches the captions of the test set with their images."""
    captions = scorer.text_features(tests.captions)
    return retrieval(real.features("clip")[tests.owners], captions, scorer.encode_text(tests.captions))


def measure_prior(
    model: TextToImage,
    sampling: SamplingOptions,
    tests: TestSet,
    tokenized: Tokenized,
    extractors: Sequence[FeatureExtractor],
    seed: int,
) -> Drawn:
    """Measures the likelihood of the real tokens, and one drawn image per caption.

    Args:
      model: the prior with its tokenizer, and the CLIP of the CLIP score if any.
      sampling: the sampling parameters.
      tests: captions and real images.
      tokenized: the real images' tokens and statistics.
      extractors: the feature extractors.
      seed: of the samples.
    """
    parameters, count = dataclasses.asdict(sampling), len(tests.captions)
    mine, shared = shared_batches(count, model.rows_at_once)
    drawn, text = ImageSet(extractors, count, tokenized.real.radii, mine), model.encode_text(tests.captions)
    nats, seconds, kept = 0.0, 0.0, []
    model.generate(tests.captions[:1] * len(shared[0][0]), seed=seed, **parameters)  # compiles
    for places, valid in shared:
        codes = tokenized.tokens[tests.owners[places]]
        loss = functools.partial(_nats, model.prior, model.params)
        nats += valid.sum() * float(over_rows(model.mesh, loss, text[places], codes, valid))
        captions, start = [tests.captions[i] for i in places], time.perf_counter()
        images = model.generate(captions, seed=seed, **parameters)[:, 0]
        seconds += time.perf_counter() - start
        drawn.add(images[valid])
        if tests.scenes is not None or not kept:
            kept.append(images[valid])
    drawn = drawn.of_all_hosts()
    sums = _of_all_hosts(nats=np.array([nats]), seconds=np.array([seconds]))
    kept = [part["kept"] for part in from_all_hosts({"kept": np.concatenate(kept)})]
    kept = kept[0] if tests.scenes is None else np.concatenate(kept)  # the first host has the first images
    whole, parts = {}, {}
    if tests.scenes is not None:
        parts = shapes.score(kept, tests.scenes)
        whole = {name: parts.pop(name) for name in ("caption_accuracy", "attribute_accuracy")}
    by_radius = _by_radius(drawn, tokenized.real)
    metrics = {
        **whole,
        "image_nats_per_token": float(sums["nats"].sum()) / count,
        **({} if model.scorer is None else _clip_score(model.scorer, drawn, tests)),
        **by_radius["0"],
        **drawn.precision_recall(tokenized.real),
        "steps": model.prior.decoding_steps(sampling.steps),
        "seconds_per_image": float(sums["seconds"].sum()) / count,
        **({"by_attribute": parts} if parts else {}),
    }
    return Drawn(metrics, by_radius, kept[:SHOWN])


def _clip_score(scorer: ClipScorer, drawn: ImageSet, tests: TestSet) -> Metrics:
    """Scores one image per caption from the features of the extractor "clip"."""
    cosines = np.sum(drawn.features("clip") * scorer.text_features(tests.captions), axis=1)
    return clip_score.compute(clip_score.add(clip_score.empty(), cosines))


@jax.jit(static_argnums=0)
def _nats(prior, params, text, tokens, valid) -> jax.Array:
    _, scalars = prior.loss(params, text, tokens, jax.random.key(0), train=False, valid=valid)
    return scalars["image_nats"]


def measure_candidates(
    model: TextToImage,
    sampling: SamplingOptions,
    tests: TestSet,
    real: ImageSet,
    extractors: Sequence[FeatureExtractor],
    seed: int,
    n: int,
    captions: int,
) -> tuple[Metrics, np.ndarray]:
    """Measures the best of 1, 2, 4, … n candidates by CLIP.

    CLIP score and caption accuracy are means over all disjoint groups of candidates of that number. FID is over the
    first group, so that it always compares one image per caption.

    Args:
      model: the prior with its tokenizer and the CLIP that ranks.
      sampling: the sampling parameters.
      tests: captions and real images.
      real: statistics of the real images.
      extractors: the feature extractors.
      seed: of the samples.
      n: largest number of candidates.
      captions: number of captions, the first ones.

    Returns:
      Metrics by number of candidates, and the best of n for the first captions, uint8 [up to 16, H, W, 3].
    """
    parameters, count = dataclasses.asdict(sampling), min(captions, len(tests.captions))
    numbers = [2**i for i in range(n.bit_length()) if 2**i < n] + [n]
    mine = share(count)
    sets = {number: ImageSet(extractors, count, part=mine) for number in numbers}
    scores, right, shown = [], [], []
    for start in range(0, len(mine), per_call := max(1, model.rows_at_once // n)):
        rows = mine[start : start + per_call]
        ranked = model.best_of([tests.captions[i] for i in rows], n, keep=n, seed=seed, progress=False, **parameters)
        for number, drawn in sets.items():
            drawn.add(ranked.best_of_first(number).images[:, 0])
        drawn_order = np.argsort(ranked.numbers, axis=1)
        scores.append(np.take_along_axis(ranked.scores, drawn_order, axis=1))
        shown += [ranked.images[:, 0]] if start < SHOWN else []
        if tests.scenes is not None:
            images = ranked.images.reshape(-1, *ranked.images.shape[2:])
            verdicts = shapes.right_captions(images, [tests.scenes[i] for i in rows for _ in range(n)])
            right.append(np.take_along_axis(verdicts.reshape(ranked.scores.shape), drawn_order, axis=1))
    verdicts = {"right": np.concatenate(right)} if right else {}
    whole = _of_all_hosts(scores=np.concatenate(scores), shown=np.concatenate(shown)[:SHOWN], **verdicts)
    metrics = {}
    for number, drawn in sets.items():
        best = _best_places(whole["scores"], number)
        chosen = lambda x, best=best: np.take_along_axis(x, best, axis=1)
        metrics[str(number)] = {
            **({"caption_accuracy": float(chosen(whole["right"]).mean())} if right else {}),
            **clip_score.compute(clip_score.add(clip_score.empty(), chosen(whole["scores"]).reshape(-1))),
            **drawn.of_all_hosts().distances(real),
        }
    return metrics, whole["shown"][:SHOWN]


def _best_places(scores: np.ndarray, number: int) -> np.ndarray:
    """Finds the highest score in each disjoint group of `number` candidates: [C, N] to int [C, N // number]."""
    groups = scores.shape[1] // number
    inside = scores[:, : groups * number].reshape(len(scores), groups, number).argmax(-1)
    return inside + number * np.arange(groups)
