"""What one training optimises: the `Task` protocol, and the `Job` that `train.py` runs.

`train.py` knows nothing about images, text or models.  A task module (`dvae.py`, `prior.py`, `clip.py`) turns a
configuration into a `Job`: the task, and its batches.

B is the global batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np
import optax

from dalle_jax.pytree import PyTree

Batch = dict[str, Any]


class Task(Protocol):
    """A model with its loss and its measures.

    Attributes:
      schedules: schedules the loss depends on, by name; evaluated at the step and logged beside the loss.
      best_metric: the key of `evaluate`'s result that "best checkpoint" means; lower is better.
      frozen: parameters that are used and not trained (an image tokenizer), {} where there are none.  They reach
        `loss`, `evaluate` and `preview` as an argument, laid out on the mesh, never as a constant of the program.
    """

    schedules: Mapping[str, optax.Schedule]
    best_metric: str
    frozen: PyTree

    def init(self, key: jax.Array) -> PyTree:
        """Fresh parameters (linen's variables["params"], still boxed with their logical names).  Traced by jit."""

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss over the batch (float32 scalar) and scalars to log (means over the batch).  Traced by jit.

        Args:
          params: unboxed parameters.
          frozen: `self.frozen` on the mesh.
          batch: arrays [B, ...] split over the mesh.
          key: a key of this step alone.
          step: int32 scalar, the number of updates before this one.
        """

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """Measures over batches [B, ...], each with "valid" bool [B] (false: padding of the last batch)."""

    def preview(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> np.ndarray:
        """One picture, uint8 [H, W, 3], that shows what the model does on an evaluation batch."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A task and its data.

    Attributes:
      task: see `Task`.
      train_batches: makes the training iterator, endless, over this host's rows (`parallel.host_rows`) of each batch.
        It has `get_state()`/`set_state()` (a grain iterator, or anything whose state is a JSON value or bytes) that
        speak of the batch delivered last, and `close()` where it holds processes.
      eval_batches: makes one pass over the evaluation batches, always the same; of each, this host's rows.
      data_counts: returns counts for the training log by name, such as "left_out/missing file" (see `Pipeline.counts`).
    """

    task: Task
    train_batches: Callable[[], Iterator[Batch]]
    eval_batches: Callable[[], Iterable[Batch]]
    data_counts: Callable[[], Mapping[str, int]] = dict


def zeros_like(make: Callable[..., PyTree], *args: Any) -> PyTree:
    """What `make(*args)` gives, all zeros and without memory: each array is one zero, read everywhere."""
    shapes = nn.meta.unbox(jax.eval_shape(make, *args))
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
