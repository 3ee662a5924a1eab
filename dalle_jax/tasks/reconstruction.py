"""The parts that trainings of all image tokenizers share: previews, metrics over batches, and words about them.

B rows    H, W image    V vocabulary
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.source import DataOptions, Source, UnreadableExample, decode_captions
from dalle_jax.distributed.rows import to_host
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.metrics import codebook
from dalle_jax.pytree import PyTree
from dalle_jax.reporting.images import to_uint8
from dalle_jax.tasks import words
from dalle_jax.tasks.preview import preview_grid, shown_rows
from dalle_jax.tasks.task import Batch

_PREVIEW_ROWS = 16
_START_IMAGES = 1024  # for the clusters that codes start from


class ReconstructionTask:
    """Base of the `Task` of an image tokenizer. Subclasses add `schedules`, `title`, `init` and `loss`.

    Attributes:
      best_metric: "psnr" of images decoded from tokens; higher is better.
      studies: see `Task`.
      frozen: nothing.
      tokenizer: the image tokenizer that is trained.
    """

    best_metric = "+psnr"
    studies = "images"
    frozen: PyTree = {}

    def __init__(self, tokenizer: ImageTokenizer, held_out: Source | None):
        """Creates the task.

        Args:
          tokenizer: the image tokenizer to train.
          held_out: the evaluation split, whose captions the preview shows; None for a preview without captions.
        """
        self.tokenizer, self._held_out = tokenizer, held_out

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """See `Task.evaluate`. All metrics are of images decoded from tokens, because sampling decodes tokens.

        The metrics are:
          mse: mean squared error of pixels in [0, 1].
          psnr: of the mean squared error over all images, dB.
          codebook_perplexity, codebook_usage: of the tokens of all batches together.
        """
        del frozen, key
        return mean_metrics(_measure(self.tokenizer, params, batch) for batch in batches)

    def preview(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> np.ndarray:
        """Draws up to 16 images, each with its reconstruction from tokens and, if it has one, its caption."""
        del frozen, key
        images, valid = to_host((batch["image"], batch["valid"]))
        rows = shown_rows(valid, _PREVIEW_ROWS)
        shown = to_uint8(to_host(_reconstruct(self.tokenizer, params, images[rows])))
        captions = [""] * len(rows)
        if self._held_out is not None:
            captions = [_caption(self._held_out, index) for index in to_host({"index": batch["index"]})["index"][rows]]
        return preview_grid(captions, [("real", images[rows]), ("reconstructed", shown)])

    def training_flops(self, image_size: int) -> float:
        """Counts the operations of an update for one image; see `aot/model_flops.py`."""
        return self.tokenizer.flops(image_size).training

    def in_words(self, metrics: Mapping[str, float], examples: int) -> list[str]:
        """See `Task.in_words`."""
        tokens = examples * math.prod(self.tokenizer.grid(self.tokenizer.image_size))
        usage, perplexity = metrics["codebook_usage"], metrics["codebook_perplexity"]
        return [
            words.reconstruction_in_words(metrics["psnr"]),
            words.codebook_in_words(usage, perplexity, self.tokenizer.vocab_size, tokens),
        ]

    def next_steps(self, config: ConfigDict, workdir: str, batch: Batch, flags: Sequence[str]) -> list[str]:
        """See `Task.next_steps`."""
        del batch, flags
        tokenizer = words.flag("config.tokenizer_from", workdir)
        return [f"train a prior with it: {words.train_command('prior', config, tokenizer)}"]


def _caption(source: Source, index: int) -> str:
    """Returns the first caption of an example, or ""."""
    try:
        return decode_captions(source.record(int(index)))[0]
    except UnreadableExample:
        return ""


# This is a function of the tokenizer, not a method of the task, because `jax.jit` keeps its static arguments alive.
@functools.partial(jax.jit, static_argnums=0)
def _reconstruct(tokenizer: ImageTokenizer, params: PyTree, images: jax.Array) -> jax.Array:
    """Encodes uint8 images [B, H, W, 3] and decodes their tokens: float32 [B, H, W, 3]."""
    return tokenizer.decode(params, tokenizer.encode(params, images))


@functools.partial(jax.jit, static_argnums=0)
def _measure(tokenizer: ImageTokenizer, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    """Returns sums over the valid rows of a batch: scalars, and the counts of the codes, float32 [V]."""
    images, valid = batch["image"], batch["valid"]
    tokens = tokenizer.encode(params, images)
    error = tokenizer.decode(params, tokens) - images.astype(jnp.float32) / 255
    sums = row_sums({"mse": jnp.mean(error**2, axis=(1, 2, 3))}, valid)
    return {**sums, "counts": codebook.count(tokens, tokenizer.vocab_size, valid)}


def decibels(mean_squared_error: jax.Array) -> jax.Array:
    """Converts the mean squared error of pixels in [0, 1] to a peak signal-to-noise ratio in dB."""
    return -10.0 * jnp.log10(jnp.maximum(mean_squared_error, 1e-10))


def row_sums(per_row: Mapping[str, jax.Array], valid: jax.Array) -> dict[str, jax.Array]:
    """Sums values of rows, [B] each, over the valid rows, bool [B]. "rows" is the number of these."""
    values = {**per_row, "rows": jnp.ones(valid.shape)}
    return {name: jnp.sum(jnp.where(valid, value, 0.0)) for name, value in values.items()}


def row_means(measured: Iterable[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Computes means per row from the sums of `row_sums` over batches."""
    sums = [to_host(each) for each in measured]
    total = {name: float(np.sum([each[name] for each in sums], dtype=np.float64)) for name in sums[0]}
    rows = max(total.pop("rows"), 1.0)
    return {name: value / rows for name, value in total.items()}


def mean_metrics(measured: Iterable[Mapping[str, jax.Array]]) -> dict[str, float]:
    """Adds up the sums of batches and computes the metrics of all rows together.

    Args:
      measured: for each batch, sums over its valid rows: "rows" (their number), "counts" (of the codes, float32 [V]),
        "mse" (of pixels in [0, 1]), and others.

    Returns:
      The mean per row of everything but counts; "psnr" in dB, "codebook_perplexity" and "codebook_usage".
    """
    sums = [to_host(each) for each in measured]
    total = {name: np.sum([each[name] for each in sums], axis=0, dtype=np.float64) for name in sums[0]}
    rows = max(float(total.pop("rows")), 1.0)
    counts = jnp.asarray(total.pop("counts"), jnp.float32)
    means = {name: float(value) / rows for name, value in total.items()}
    return {
        **means,
        "psnr": float(decibels(jnp.float32(means["mse"]))),
        "codebook_perplexity": float(codebook.perplexity(counts)),
        "codebook_usage": float(codebook.usage(counts)),
    }


def first_images(options: DataOptions, config: ConfigDict) -> np.ndarray:
    """Reads the first images of a training for clusters: uint8 [n, H, W, 3], n at most 1024, on every host all.

    Args:
      options: the data set.
      config: the training configuration; `seed` and `batch_size` are read.
    """
    batch_size = config.batch_size
    training = Pipeline(options, split=options.train_split, train=True, batch_size=batch_size, seed=config.seed)
    batches = itertools.islice(iter(training), 1 + _START_IMAGES // batch_size)
    return np.concatenate([batch["image"] for batch in batches])[:_START_IMAGES]
