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
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import TextModel
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout

Batch = dict[str, Any]  # arrays [B, ...] by name


class Task(Protocol):
    """A model with its loss and its metrics.

    Attributes:
      schedules: schedules that the loss depends on, by name. They are evaluated at each step and logged next to the
        loss.
      best_metric: key of the result of `evaluate` that selects the best checkpoint. Lower is better.
      frozen: parameters that are used and not trained, such as those of an image tokenizer, or {}. They reach `loss`,
        `evaluate` and `preview` as an argument on the mesh, never as a constant of the program.
    """

    schedules: Mapping[str, optax.Schedule]
    best_metric: str
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
          The loss, float32 scalar, and scalars to log, means over the batch.
        """

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """Computes metrics over batches.

        Args:
          params: unboxed parameters.
          frozen: `self.frozen`, on the mesh.
          batches: each has "valid", bool [B], which is false for the padding of the last batch.
          key: key of this evaluation.
        """

    def preview(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> np.ndarray:
        """Draws one image, uint8 [H, W, 3], that shows the model's outputs on an evaluation batch."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A task and its data.

    Attributes:
      task: the task.
      train_batches: creates the endless training iterator over this host's rows of each batch (`rows.host_rows`). The
        iterator has `get_state()` and `set_state()`, which describe the position after the last delivered batch. The
        state is a JSON value or bytes. An iterator that holds worker processes also has `close()`.
      eval_batches: creates one pass over this host's rows of the evaluation batches, which are always the same.
      examples: number of examples of the training split, or None if unknown.
      data_counts: returns counts for the training log by name, such as "left_out/missing file" (see `Pipeline.counts`).
    """

    task: Task
    train_batches: Callable[[], Iterator[Batch]]
    eval_batches: Callable[[], Iterable[Batch]]
    data_counts: Callable[[], Mapping[str, int]] = dict
    examples: int | None = None


def make_job(
    task: Task,
    config: ConfigDict,
    options: DataOptions,
    rows: Sequence[int] | None,
    text_model: TextModel | None = None,
    layout: TokenLayout | None = None,
) -> Job:
    """Builds the job of a task, with the training and evaluation batches of a configuration.

    Args:
      task: the task.
      config: a training configuration; `seed` and `batch_size` are read.
      options: the data set.
      rows: rows of each batch that this host reads; None for all.
      text_model: encodes the captions; None if the batches need no text.
      layout: pads the captions; None without a text model.

    Raises:
      DataError: the data cannot be opened.
    """
    pipeline = functools.partial(Pipeline, options, text_model, layout, batch_size=config.batch_size, rows=rows)
    training = pipeline(split=options.train_split, train=True, seed=config.seed)
    evaluation = pipeline(split=options.eval_split, train=False)
    return Job(
        task=task,
        train_batches=lambda: iter(training),
        eval_batches=lambda: iter(evaluation),
        data_counts=training.counts,
        examples=len(training.source),
    )


def zeros_like(make: Callable[..., PyTree], *args: Any) -> PyTree:
    """Returns zeros with the shapes and dtypes of `make(*args)`; each array is a view of one number."""
    shapes = nn.meta.unbox(jax.eval_shape(make, *args))
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
