"""Measures of a trained prior's workdir: its tokenizer, its likelihood, and what its pictures show.

B pictures    H, W their size    N image tokens
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from dalle_jax import report
from dalle_jax import workdir as workdirs
from dalle_jax.data.augment import augment
from dalle_jax.data.shapes_captions.scenes import Scene
from dalle_jax.data.sources import DataOptions, open_source
from dalle_jax.errors import DataError
from dalle_jax.generate import SamplingOptions, TextToImage
from dalle_jax.metrics import codebook, pictures, shapes
from dalle_jax.options import from_config


@dataclasses.dataclass(frozen=True)
class Examples:
    """Pictures of a split, with what is known of them.

    Attributes:
      images: uint8 [B, H, W, 3].
      captions: the first caption of each.
      scenes: what each caption states, for the embedded shapes; None for other data.
    """

    images: np.ndarray
    captions: list[str]
    scenes: list[Scene] | None


def read_examples(data: dict[str, Any], split: str, count: int) -> Examples:
    """The first `count` readable examples of a split, as a prior's training saw its pictures, without augmentation.

    Args:
      data: the `data` section of the training's configuration.
      split: of its source.
      count: B.

    Raises:
      DataError: where there are fewer.
    """
    options = DataOptions.from_config(data)
    source = open_source(options, split)
    found = []
    for index in range(len(source)):
        if len(found) == count:
            break
        try:
            found.append(source[index])
        except DataError:  # the training has counted and named it
            continue
    if len(found) < count:
        raise DataError(
            f"{source.description} has {len(found)} readable examples, {count} are asked for: lower config.count."
        )
    images = np.stack([augment(example["image"], options.image_size, "none", None) for example in found])
    scenes = None
    if "scene" in found[0]["extra"]:
        scenes = [Scene.from_json(example["extra"]["scene"]) for example in found]
    return Examples(images, [example["captions"][0] for example in found], scenes)


def measure(model: TextToImage, examples: Examples, options: SamplingOptions, seed: int = 0):
    """All figures of one split: one sample a caption, no reranking.

    Args:
      model: what is measured.
      examples: of a split that it was not trained on.
      options: how samples are drawn.
      seed: of the samples.

    Returns:
      figures: {"dvae": {...}, "<prior>": {...}}, and the pictures (reconstructed, generated), each uint8 [B, H, W, 3].
    """
    # The last one repeats: every batch has the compiled size.
    step = min(model.rows_at_once, len(examples.images))
    batches = [
        np.minimum(np.arange(i, i + step), len(examples.images) - 1) for i in range(0, len(examples.images), step)
    ]
    text = model.encode_text(examples.captions)
    tokens, reconstructed, nats, quality = [], [], [], pictures.empty()
    for rows in batches:
        valid = np.arange(step) < len(np.unique(rows))
        tokens.append(model.encode(examples.images[rows]))
        reconstructed.append(model.decode(tokens[-1]))
        quality = pictures.add(quality, examples.images[rows], reconstructed[-1], valid)
        nats.append(_nats(model.prior, model.params, text[rows], tokens[-1], jnp.asarray(valid)))
    count = len(examples.images)
    tokens, reconstructed = (np.concatenate(x)[:count] for x in (tokens, reconstructed))
    sizes = np.array([len(np.unique(rows)) for rows in batches])
    used = codebook.count(jnp.asarray(tokens), model.tokenizer.vocab_size)
    dvae = {
        "psnr": pictures.compute(quality)["psnr"],
        "codebook_perplexity": float(codebook.perplexity(used)),
        "codebook_usage": float(codebook.usage(used)),
    }

    knobs = dataclasses.asdict(options)
    model.generate(examples.captions[:1] * count, seed=seed, **knobs)  # compiles: not part of the time per picture
    start = time.perf_counter()
    generated = model.generate(examples.captions, seed=seed, **knobs)[:, 0]
    seconds = time.perf_counter() - start
    prior = {
        "image_nats_per_token": float(np.average(nats, weights=sizes)),
        "steps": model.prior.decoding_steps(options.steps),
        "seconds_per_image": seconds / count,
    }

    if examples.scenes is not None:
        dvae["caption_accuracy"] = shapes.score(reconstructed, examples.scenes)["caption_accuracy"]
        score = shapes.score(generated, examples.scenes)
        whole = {name: score.pop(name) for name in ("caption_accuracy", "attribute_accuracy")}
        prior = {**whole, **prior, "by_attribute": score}
    return {"dvae": dvae, model.prior.name: prior}, reconstructed, generated


@jax.jit(static_argnums=0)
def _nats(prior, params, text, tokens, valid) -> jax.Array:
    _, scalars = prior.loss(params, text, tokens, jax.random.key(0), train=False, valid=valid)
    return scalars["image_nats"]


def grid(examples: Examples, columns: Sequence[tuple[str, np.ndarray]], title: str, rows: int = 16) -> np.ndarray:
    """Captions beside their pictures: uint8 [H', W', 3].

    Args:
      examples: for the captions.
      columns: heading and pictures, uint8 [B, H, W, 3], of each column.
      title: over everything.
      rows: at most so many captions.
    """
    rows = min(rows, len(examples.captions))
    shown = [(examples.captions[i], [images[i] for _, images in columns]) for i in range(rows)]
    return report.grid(shown, [name for name, _ in columns], title=title, blocks=2 if rows > 4 else 1)


def run(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Writes `report.json` and `grid.png`, and prints the figures.

    Args:
      config: see `configs/evaluate.py`.
      workdir: where to write.

    Returns:
      What the report holds.
    """
    trained = workdirs.read_config(config.model_workdir)
    model = TextToImage.load(config.model_workdir, config.step, config.rows_at_once)
    examples = read_examples(trained["data"], config.split, config.count)
    options = from_config(SamplingOptions, config.sampling, "sampling")
    figures, reconstructed, generated = measure(model, examples, options, config.seed)
    figures |= {
        "samples": len(examples.captions), "split": config.split, "workdir": model.workdir, "step": model.step,
        "sampling": dataclasses.asdict(options), "seed": config.seed, "device": device(),
    }  # fmt: skip
    out = epath.Path(workdir).expanduser()
    columns = [("real", examples.images), ("reconstructed", reconstructed), ("generated", generated)]
    report.save_png(out / "grid.png", grid(examples, columns, f"{model.workdir}: {config.split} captions"))
    report.save_json(out / "report.json", figures)
    print(report.table(figures) + f"\n{out / 'grid.png'}\n{out / 'report.json'}")
    return figures


def device() -> str:
    """What it ran on, for reports: kind and number of devices."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"
