"""Contrastive training of CLIP within a batch (arXiv 2103.00020, section 2.3 and figure 3).

    loss = ½ (cross-entropy of each image over the captions + cross-entropy of each caption over the images)

The batch is the global batch: every image is compared with the captions of all devices and hosts. A slice of a batch
would be an easier problem, so gradients cannot be accumulated.

Two deviations from the paper:

* Images that share a caption are not used as negatives for each other. Equal captions are rare among the paper's 400
  million images and common in small data sets.
* Each caption may also have corrupted copies of its image as negatives (`corrupted_negatives.py`).

    B rows    T text positions    E embedding    n corrupted copies of each image
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data.examples import batch_shapes
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import CaptionModel
from dalle_jax.distributed.rows import to_host
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.metrics.retrieval import AMONG, retrieval
from dalle_jax.models import clip as models
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.pytree import PyTree
from dalle_jax.tasks import words
from dalle_jax.tasks.corrupted_negatives import NegativeOptions, spoil
from dalle_jax.tasks.preview import preview_grid, shown_rows
from dalle_jax.tasks.task import Batch, Job, make_job
from dalle_jax.token_layout import PaddedIds

_PREVIEW_ROWS, _PREVIEW_MATCHES = 6, 4


def contrastive_loss(
    images: jax.Array,
    captions: jax.Array,
    scale: jax.Array,
    text: jax.Array | None = None,
    spoiled: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Computes the symmetric contrastive loss.

    Args:
      images: unit vectors of images, float32 [B, E].
      captions: unit vectors of captions, float32 [B, E]; row i belongs to image i.
      scale: factor on the similarities, float32 scalar.
      text: ids of the captions, int32 [B, T]. Rows with equal ids are not negatives for each other. With None, all
        captions differ.
      spoiled: corrupted copies of each image: unit vectors, float32 [B, n, E], and which of them count, bool [B, n].
        None for no copies.

    Returns:
      The mean loss, float32 scalar, and scalars to log:
        image_to_text_accuracy, text_to_image_accuracy: share of rows whose partner is the nearest of the batch.
        spoiled_accuracy: with `spoiled`, share of the counted copies that are farther from the caption than the image.
    """
    logits = scale * jnp.matmul(images, captions.T, precision=jax.lax.Precision.HIGHEST)
    if text is not None:
        same = (text[:, None] == text[None]).all(-1) & ~np.eye(len(text), dtype=bool)
        logits = jnp.where(same, -jnp.inf, logits)
    logits = constrain(logits, "batch", None)
    own = jnp.diagonal(logits)
    among_captions, among_images = (jax.nn.logsumexp(logits, axis=axis) for axis in (1, 0))
    right = [jnp.argmax(logits, axis=axis) == jnp.arange(len(logits)) for axis in (1, 0)]
    scalars = {"image_to_text_accuracy": jnp.mean(right[0]), "text_to_image_accuracy": jnp.mean(right[1])}
    if spoiled is not None:
        vectors, counts = spoiled
        wrong = scale * jnp.einsum("bne,be->bn", vectors, captions, precision=jax.lax.Precision.HIGHEST)
        wrong = jnp.where(counts, wrong, -jnp.inf)
        among_images = jnp.logaddexp(among_images, jax.nn.logsumexp(wrong, axis=1))
        won = (wrong < own[:, None]) & counts
        scalars["spoiled_accuracy"] = jnp.sum(won) / jnp.maximum(jnp.sum(counts), 1)
    return jnp.mean(among_captions + among_images) / 2 - jnp.mean(own), scalars


_loss = jax.jit(contrastive_loss)


class CLIPTask:
    """The `Task` of CLIP.

    Attributes:
      schedules: none.
      best_metric: "loss" on the evaluation split.
      title, studies: see `Task`.
      frozen: nothing.
      negatives: the corrupted images that training adds to those of the batch.
    """

    schedules: dict[str, optax.Schedule] = {}
    best_metric = "loss"
    title, studies = "CLIP", "captions"
    frozen: PyTree = {}

    def __init__(self, clip: CLIP, text_model: CaptionModel | None, negatives: NegativeOptions | None = None):
        """Creates the task.

        Args:
          clip: the model to train. Its `end_id` is the first id after those of the text model.
          text_model: decodes captions for the preview; None if no preview is drawn.
          negatives: the corrupted images that training adds to those of the batch; None for none.
        """
        self.clip, self._text_model, self.negatives = clip, text_model, negatives or NegativeOptions()

    def init(self, key: jax.Array) -> PyTree:
        """See `Task.init`."""
        return self.clip.init(key)

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task.loss`. The batch needs "image", uint8 [B, H, W, 3], and "text", int32 [B, T - 1].

        The scalars are the accuracies of `contrastive_loss`, and "logit_scale", the factor on the similarities.
        """
        del frozen, step
        images, spoiled = batch["image"], None
        if self.negatives.spoiled:
            wrong, counts = spoil(images, key, self.negatives)
            # Copies stand next to their image, so that each device keeps its rows.
            all_images = jnp.concatenate([images[:, None], wrong], axis=1)
            vectors = self.clip.encode_image(params, all_images.reshape(-1, *images.shape[1:]))
            vectors = vectors.reshape(*all_images.shape[:2], -1)
            images, spoiled = vectors[:, 0], (vectors[:, 1:], counts)
        else:
            images = self.clip.encode_image(params, images)
        captions = self.clip.encode_text(params, with_end(batch["text"], self.clip.options.end_id))
        scale = self.clip.scale(params)
        loss, scalars = contrastive_loss(images, captions, scale, batch["text"], spoiled)
        return loss, {**scalars, "logit_scale": scale}

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """See `Task.evaluate`. Returns "loss", without corrupted images, and the metrics of `metrics.retrieval`.

        All are means over consecutive groups of 64 examples, so that they do not depend on the batch size.
        """
        del frozen, key
        parts = []
        for batch in batches:
            *made, valid = to_host(_features(self.clip, params, batch))
            parts.append([x[valid] for x in made])
        images, captions, text = (np.concatenate(column) for column in zip(*parts))
        metrics = retrieval(images, captions, text)
        among = min(AMONG, len(images))
        scale = to_host(self.clip.scale(params))
        losses = [
            float(_loss(images[i : i + among], captions[i : i + among], scale, text[i : i + among])[0])
            for i in range(0, len(images) - among + 1, among)
        ]
        return {"loss": float(np.mean(losses)), **metrics}

    def preview(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> np.ndarray:
        """Draws captions, each with its image and the images of the batch that match it best."""
        del frozen, key
        real = to_host(batch["image"])
        images, captions, text, valid = to_host(_features(self.clip, params, batch))
        images, captions, text, real = images[valid], captions[valid], text[valid], real[valid]
        rows = shown_rows(np.ones(len(text), bool), _PREVIEW_ROWS)
        best = np.argsort(-captions[rows] @ images.T, axis=1)[:, :_PREVIEW_MATCHES]
        matches = [("best matches", real[column]) for column in best.T]
        return preview_grid([self._decoded(text[row]) for row in rows], [("its image", real[rows]), *matches])

    def _decoded(self, row: np.ndarray) -> str:
        """Returns the caption of ids, int32 [T - 1], or "" without a text model."""
        given = [i for i in row.tolist() if i < self.clip.options.end_id]
        return "" if self._text_model is None else self._text_model.decode(given)

    def in_words(self, metrics: Mapping[str, float], examples: int) -> list[str]:
        """See `Task.in_words`."""
        del examples
        return words.retrieval_in_words(metrics)

    def next_steps(self, config: ConfigDict, workdir: str, batch: Batch, flags: Sequence[str]) -> list[str]:
        """See `Task.next_steps`."""
        del flags
        text = np.asarray(batch["text"])[np.asarray(batch["valid"])]
        captions = words.example_captions(map(self._decoded, text), 1)
        ranked = words.flag("config.clip", workdir), "--config.candidates=16", "--config.n=4"
        command = words.draw_command(f"runs/prior-{config.variant}", captions, *ranked)
        return [f"rank the candidates of a prior with it: {command}"]


def with_end(text: jax.Array, end_id: int) -> jax.Array:
    """Converts ids of `PaddedIds`, int32 [B, T - 1], to ids for CLIP, int32 [B, T].

    The end token follows the caption and fills the remaining positions.
    """
    return jnp.pad(jnp.minimum(text, end_id), ((0, 0), (0, 1)), constant_values=end_id)


# A function of the model and not a method of the task: `jax.jit` keeps its static arguments alive.
@functools.partial(jax.jit, static_argnums=0)
def _features(clip: CLIP, params: PyTree, batch: Batch) -> tuple[jax.Array, ...]:
    """Encodes a batch; every device holds the whole result.

    Returns:
      Unit vectors of images and of captions, float32 [B, E] each; text, int32 [B, T - 1]; valid, bool [B].
    """
    images = clip.encode_image(params, batch["image"])
    captions = clip.encode_text(params, with_end(batch["text"], clip.options.end_id))
    whole = (images, captions, batch["text"], batch["valid"])
    return tuple(constrain(x, *[None] * x.ndim) for x in whole)


def _task(config: ConfigDict, text_vocab: int, text_model: CaptionModel | None) -> tuple[CLIPTask, PaddedIds]:
    """Builds the task of a configuration, and the ids of its captions."""
    if (steps := config.optimizer.accumulate_steps) > 1:
        raise ConfigError(
            f"config.optimizer.accumulate_steps={steps}: the contrastive loss compares all rows of a batch, so a batch "
            "cannot be split. Set it to 1, and reduce batch_size until the batch fits the devices."
        )
    negatives = from_config(NegativeOptions, config.get("negatives", {}), "negatives")
    negatives.check(config.data.image_size, config.batch_size)
    captions = PaddedIds(text_vocab, config.text.length)
    return CLIPTask(CLIP(models.options_of_training(config, text_vocab)), text_model, negatives), captions


def check_config(config: ConfigDict) -> None:
    """See `registry.check_config`."""
    from_config(DataOptions, config.data, "data")
    workdirs.check_text_section(config.text)
    _task(config, config.text.vocab_size, None)


def build(config: ConfigDict, workdir: str, rows: Sequence[int] | None = None) -> Job:
    """Builds the job of `configs/clip.py`.

    Raises:
      ConfigError: an unknown key, sizes that do not fit each other, or accumulated gradients.
    """
    options = from_config(DataOptions, config.data, "data")
    text_model = workdirs.ensure_text_model(config.text, open_source(options, options.train_split).captions(), workdir)
    task, captions = _task(config, text_model.vocab_size, text_model)
    return make_job(task, config, options, rows, text_model, captions)


def abstract(config: ConfigDict) -> tuple[CLIPTask, Batch]:
    """See `registry.abstract`."""
    task, captions = _task(config, config.text.vocab_size, None)
    return task, batch_shapes(config.data.image_size, captions, config.batch_size)


def options(config: Mapping[str, Any]) -> dict[str, type]:
    """See `tasks.options`."""
    del config
    return {"model": CLIPOptions, "negatives": NegativeOptions}
