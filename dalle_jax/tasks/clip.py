"""Training CLIP: pictures and captions told apart within a batch (arXiv 2103.00020, section 2.3 and figure 3).

    loss = ½ (cross-entropy of each picture over the batch's captions + of each caption over its pictures)

The batch is the global one: every picture meets the captions of all devices and hosts, and the loss is that of one
device with the whole batch. A slice of it would be another, easier problem, so gradients are not accumulated here.
Where a caption occurs more than once in a batch, which the paper's 400 million pictures make rare and small data sets
common, its other pictures are not taken for wrong ones. Beside the batch's pictures, each caption may meet spoiled ones
of its own (`negatives.py`), which are nobody's right ones; the paper has none.

    B rows    T text positions    E embedding    n spoiled pictures of each
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data.examples import batch_shapes
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import TextModel
from dalle_jax.distributed.rows import to_host
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.metrics.retrieval import AMONG, retrieval
from dalle_jax.models import clip as models
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.pytree import PyTree
from dalle_jax.reporting.images import image_grid
from dalle_jax.tasks.corrupted_negatives import NegativeOptions, spoil
from dalle_jax.tasks.task import Batch, Job
from dalle_jax.token_layout import TokenLayout

_PREVIEW_ROWS, _PREVIEW_MATCHES = 6, 4


def contrastive_loss(
    images: jax.Array,
    captions: jax.Array,
    scale: jax.Array,
    text: jax.Array | None = None,
    spoiled: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The symmetric loss of matching rows.

    Args:
      images, captions: unit vectors, float32 [B, E]; row i of both belongs together.
      scale: factor on their similarities.
      text: int32 [B, T], the captions' ids: rows with equal ones are no alternatives to each other. None: all differ.
      spoiled: further wrong pictures of each caption, unit vectors, float32 [B, n, E], and which of them count, bool
        [B, n]. None: there are none.

    Returns:
      Mean loss, float32 scalar, and "image_to_text_accuracy", "text_to_image_accuracy": how often the own partner is
      the nearest of the batch; with `spoiled`, "spoiled_accuracy": how often the own picture is nearer than a spoiled
      one that counts.
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
      best_metric: "loss", on the evaluation split.
      frozen: nothing.
      negatives: the wrong pictures that training makes beside those of the batch.
    """

    schedules: dict[str, Any] = {}
    best_metric = "loss"
    frozen: PyTree = {}

    def __init__(self, clip: CLIP, text_model: TextModel | None, negatives: NegativeOptions | None = None):
        """
        Args:
          clip: what is trained; its `end_id` is the first id after the text model's.
          text_model: turns ids back into captions, for the preview; None: there is none.
          negatives: the wrong pictures that training makes beside those of the batch; None: none.
        """
        self.clip, self._text_model, self.negatives = clip, text_model, negatives or NegativeOptions()

    def init(self, key: jax.Array) -> PyTree:
        """See `Task.init`."""
        return self.clip.init(key)

    def loss(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array):
        """See `Task.loss`. The batch needs "image", uint8 [B, H, W, 3], and "text", int32 [B, T - 1]. Scalars: the
        accuracies of `contrastive_loss`, and "logit_scale", the factor on the similarities."""
        del frozen, step
        images, spoiled = batch["image"], None
        if self.negatives.spoiled:
            wrong, counts = spoil(images, key, self.negatives)
            # Side by side, so that each device keeps the rows it has.
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
        """See `Task.evaluate`. Over consecutive groups of 64 examples, whatever the batch: "loss", their mean loss
        without spoiled pictures, and the figures of `metrics.retrieval`."""
        del frozen, key
        parts = []
        for batch in batches:
            *made, valid = to_host(_features(self.clip, params, batch))
            parts.append([x[valid] for x in made])
        images, captions, text = (np.concatenate(column) for column in zip(*parts))
        figures = retrieval(images, captions, text)
        among = min(AMONG, len(images))
        scale = to_host(self.clip.scale(params))
        losses = [
            float(_loss(images[i : i + among], captions[i : i + among], scale, text[i : i + among])[0])
            for i in range(0, len(images) - among + 1, among)
        ]
        return {"loss": float(np.mean(losses)), **figures}

    def preview(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> np.ndarray:
        """Captions of the first rows, each beside its picture and the pictures of the batch that suit it best."""
        del frozen, key
        images, captions, text, _ = to_host(_features(self.clip, params, batch))
        pictures = to_host(batch["image"])
        best = np.argsort(-captions @ images.T, axis=1)[:, :_PREVIEW_MATCHES]
        shown = []
        for i in range(min(_PREVIEW_ROWS, len(text))):
            caption = self._text_model.decode([token for token in text[i].tolist() if token < self.clip.options.end_id])
            shown.append((caption, [pictures[i], *pictures[best[i]]]))
        return image_grid(shown, ("its picture", *["best matches"] * best.shape[1]))


def with_end(text: jax.Array, end_id: int) -> jax.Array:
    """Converts padded ids of a `TokenLayout`, int32 [B, T - 1], to ids for CLIP, int32 [B, T].

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


def _task(config: ConfigDict, text_vocab: int, text_model: TextModel | None) -> tuple[CLIPTask, TokenLayout]:
    """The task, and the layout that pads its captions."""
    if (steps := config.optimizer.accumulate_steps) > 1:
        raise ConfigError(
            f"config.optimizer.accumulate_steps={steps}: the contrastive loss compares all rows of a batch, and slices "
            "of it would be smaller batches with another loss. Set it to 1, and batch_size to what the devices hold."
        )
    negatives = from_config(NegativeOptions, config.get("negatives", {}), "negatives")
    negatives.check(config.data.image_size, config.batch_size)
    layout = TokenLayout(text_vocab, 1, config.text.length, 1, 1)  # only its text part is used
    return CLIPTask(CLIP(models.from_config(config, text_vocab)), text_model, negatives), layout


def build(config: ConfigDict, workdir: str, rows: Sequence[int] | None = None) -> Job:
    """The job of `configs/clip.py`.

    Raises:
      ConfigError: a wrong key, sizes that do not fit each other, or gradients that are to be accumulated.
    """
    options = from_config(DataOptions, config.data, "data")
    text_model = workdirs.ensure_text_model(config.text, open_source(options, options.train_split).captions(), workdir)
    task, layout = _task(config, text_model.vocab_size, text_model)
    pipeline = functools.partial(Pipeline, options, text_model, layout, batch_size=config.batch_size)
    training = pipeline(split=options.train_split, train=True, seed=config.seed, rows=rows)
    evaluation = pipeline(split=options.eval_split, train=False, rows=rows)
    return Job(
        task=task,
        train_batches=lambda: iter(training),
        eval_batches=lambda: iter(evaluation),
        data_counts=training.counts,
    )


def abstract(config: ConfigDict) -> tuple[CLIPTask, Batch]:
    """See `tasks.abstract`."""
    task, layout = _task(config, config.text.vocab_size, None)
    return task, batch_shapes(config.data.image_size, layout, config.batch_size)


def options(config: Mapping[str, Any]) -> dict[str, type]:
    """See `tasks.options`."""
    del config
    return {"model": CLIPOptions, "negatives": NegativeOptions}
