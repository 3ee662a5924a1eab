"""Conditions that are computed from images, such as CLIP's embeddings: computed once for a split, and read by index.

B rows    n examples of a split
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import DamagedError
from dalle_jax.priors.condition import KEY, Condition
from dalle_jax.pytree import fingerprint
from dalle_jax.storage import checksummed
from dalle_jax.storage.files import expanded
from dalle_jax.tasks.task import Batch, Job

_BATCH = 64  # images that are encoded together


class WithConditions:
    """Batches of a pipeline with the conditions of their examples, under `condition.KEY`.

    It has the methods of the pipeline's iterator.
    """

    def __init__(self, batches: Any, rows: np.ndarray):
        """Wraps an iterator.

        Args:
          batches: the iterator. Its batches have "index", int [B].
          rows: the condition of each example, [n, ...].
        """
        self._batches, self._rows = batches, rows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        return {**batch, KEY: self._rows[batch["index"]]}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._batches, name)


def rows_of_split(
    options: DataOptions, split: str, condition: Condition, model: Any, workdir: epath.PathLike
) -> np.ndarray:
    """Returns the condition of each example of a split, without augmentation.

    They are stored in the workdir if changes of the images can be seen. An unreadable example has a row of zeros.

    Args:
      options: the data set.
      split: name of the split.
      condition: the kind of condition.
      model: the model that `condition.load` returned.
      workdir: directory of the run.

    Returns:
      [n, ...].
    """
    source = open_source(options, split)
    if source.image_identity is None:
        return _computed(options, split, condition, model)
    what = f"{source.image_identity} {options.image_size} {options.fit} {fingerprint(model.params)}"
    what += f" {condition.length}" if condition.captions else ""
    key = hashlib.sha256(what.encode()).hexdigest()[:16]
    path = expanded(workdir) / f"conditions-{key}.npy"
    with first_host_first(f"the conditions {path}"):
        with contextlib.suppress(OSError, DamagedError):
            return np.load(io.BytesIO(checksummed.read(path)), allow_pickle=False)
        logging.info("Computing the conditions of the split %s once (data.condition=%s)", split, condition.name)
        rows, written = _computed(options, split, condition, model), io.BytesIO()
        np.save(written, rows)
        checksummed.write(path, written.getvalue())
        return rows


def _computed(options: DataOptions, split: str, condition: Condition, model: Any) -> np.ndarray:
    pipeline = Pipeline(options, split=split, train=False, batch_size=_BATCH)
    empty = condition.empty()
    rows = np.zeros((len(pipeline.source), *empty.shape), empty.dtype)
    with iter(pipeline) as batches:
        for batch in batches:
            rows[batch["index"][batch["valid"]]] = condition.of_images(batch["image"], model)[batch["valid"]]
    return rows


def with_conditions(job: Job, options: DataOptions, condition: Condition, model: Any, workdir: epath.PathLike) -> Job:
    """Returns the job of a prior whose batches hold the conditions of their images.

    Args:
      job: the job without them.
      options, condition, model, workdir: see `rows_of_split`.
    """
    train, held_out = (
        rows_of_split(options, split, condition, model, workdir) for split in (options.train_split, options.eval_split)
    )

    def preview() -> Batch:
        batch = job.preview_batch()
        return {**batch, KEY: held_out[batch["index"]]}

    return dataclasses.replace(
        job,
        train_batches=lambda *start: WithConditions(job.train_batches(*start), train),
        eval_batches=lambda: WithConditions(job.eval_batches(), held_out),
        preview_batch=preview,
    )
