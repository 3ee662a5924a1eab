"""The `Task` protocol, and the `Job` that the training loop runs: a task with its batches.

The training loop knows nothing about images, text or models. A task module (`dvae.py`, `prior.py`, `clip.py`) turns a
configuration into a `Job`.

    B global batch
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.source import DataOptions, Source
from dalle_jax.data.text import CaptionModel
from dalle_jax.data.token_store import TokensInMemory, TokenStore
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import PaddedIds

Batch = dict[str, Any]  # arrays [B, ...] by name


class Task(Protocol):
    """A model with its loss and its metrics.

    Attributes:
      schedules: schedules that the loss depends on, by name. They are evaluated at each step and logged next to the
        loss.
      best_metric: key of the result of `evaluate` that selects the best checkpoint. Lower values are better; a key with
        "+" in front ("+psnr") means that higher values are.
      title: the model's name for people, such as "autoregressive prior".
      studies: the part of its examples that it would learn by heart: "images" or "captions".
      frozen: parameters that are used and not trained, such as those of an image tokenizer, or {}. They reach `loss`,
        `evaluate` and `preview` as an argument on the mesh, never as a constant of the program.
    """

    schedules: Mapping[str, optax.Schedule]
    best_metric: str
    title: str
    studies: str
    frozen: PyTree

    def init(self, key: jax.Array) -> PyTree:
        """Returns new parameters, boxed with their logical axis names. Traced by jit."""

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the mean loss of a batch. Traced by jit.

        Args:
          params: unboxed parameters.
          frozen: `self.frozen`, on the mesh.
          batch: arrays [B, ...], split over the mesh.
          key: key of this step.
          step: number of updates before this one, int32 scalar.

        Returns:
          The loss, float32 scalar, and scalars to log, means over the batch. "statistics" among them is no scalar, but
          a tree of means over the batch for `after_update`; only tasks that have this method return it.
        """

    # A task may have one more attribute, `split_shapes`: boxed shapes of parts of `frozen`, by their names. These parts
    # are split over the mesh by their logical axis names, as trained parameters are. Each device holds all other parts.

    # A task whose parameters do not all follow a gradient has one more method. It is traced by jit.
    #   after_update(params, statistics, key) -> params: called after each update of the optimizer.

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """Computes metrics over batches.

        Args:
          params: unboxed parameters.
          frozen: `self.frozen`, on the mesh.
          batches: each has "valid", bool [B], which is false for the padding of the last batch.
          key: key of this evaluation.
        """

    def preview(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> np.ndarray:
        """Draws one image, uint8 [H, W, 3], that shows the model's outputs on valid rows of an evaluation batch."""

    def in_words(self, metrics: Mapping[str, float], examples: int) -> list[str]:
        """Says what metrics mean, one sentence each.

        Args:
          metrics: a result of `evaluate`.
          examples: number of examples that were evaluated.
        """

    def next_steps(self, config: ConfigDict, workdir: str, batch: Batch, flags: Sequence[str]) -> list[str]:
        """Returns lines that say how the trained model is used, with the commands.

        Args:
          config: configuration of the training.
          workdir: workdir of the training.
          batch: an evaluation batch on this host, for examples of captions.
          flags: to add to a command that reads the checkpoint, such as "--config.step=best".
        """


@dataclasses.dataclass(frozen=True)
class Job:
    """A task and its data.

    Attributes:
      task: the task.
      train_batches: creates the endless training iterator over this host's rows of each batch (`rows.host_rows`). The
        iterator has `get_state()` and `set_state()`, which describe the position after the last delivered batch. The
        state is a JSON value or bytes. An iterator that holds worker processes also has `close()`. A number as argument
        is that of batches to leave out at the beginning.
      eval_batches: creates one pass over this host's rows of the evaluation batches, which are always the same.
      data_counts: returns counts for the training log by name, such as "left_out/missing file" (see `Pipeline.counts`).
      preview_batch: creates this host's rows of a batch for the preview, spread over the held-out examples. None uses
        the first evaluation batch.
      examples, held_out: numbers of examples for training and for evaluation; 0 if unknown.
    """

    task: Task
    train_batches: Callable[..., Iterator[Batch]]
    eval_batches: Callable[[], Iterable[Batch]]
    data_counts: Callable[[], Mapping[str, int]] = dict
    preview_batch: Callable[[], Batch] | None = None
    examples: int = 0
    held_out: int = 0


def make_job(
    task: Task,
    config: ConfigDict,
    options: DataOptions,
    rows: Sequence[int] | None,
    text_model: CaptionModel | None = None,
    captions: PaddedIds | None = None,
    held_out: Source | None = None,
    tokens: TokenStore | TokensInMemory | None = None,
    source: Source | None = None,
) -> Job:
    """Builds the job of a task, with the training and evaluation batches of a configuration.

    Args:
      task: the task.
      config: a training configuration; `seed` and `batch_size` are read.
      options: the data set.
      rows: rows of each batch that this host reads; None for all.
      text_model: encodes the captions; None if the batches need no text.
      captions: pads them; None without a text model.
      held_out: the open source of the evaluation split; None opens it.
      tokens: image tokens of the training split. Its batches then hold them and no images.
      source: the open source of the training split; None opens it.

    Raises:
      DataError: the data cannot be opened.
    """
    pipeline = functools.partial(Pipeline, options, text_model, captions, batch_size=config.batch_size, rows=rows)
    evaluation = pipeline(split=options.eval_split, train=False, source=held_out)
    how = dict(train=True, seed=config.seed, held_out=evaluation.source, tokens=tokens, source=source)
    training = pipeline(split=options.train_split, **how)
    return Job(
        task=task,
        train_batches=training.batches,
        eval_batches=lambda: iter(evaluation),
        data_counts=training.counts,
        preview_batch=evaluation.spread_batch,
        examples=len(training.source),
        held_out=len(evaluation.source),
    )


def zeros_like(make: Callable[..., PyTree], *args: Any) -> PyTree:
    """Returns zeros with the shapes and dtypes of `make(*args)`; each array is a view of one number."""
    shapes = nn.meta.unbox(jax.eval_shape(make, *args))
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
