"""Fine-tuning of BEiT to the classes of class folders (arXiv 2106.08254, section 2.4).

A linear head reads the mean over the patches of the last layer. `start_from` gives the trunk of a pre-trained BEiT;
without it all parameters are trained from scratch, for comparison. The names of the classes are stored in the workdir
as its text model, `text/labels.json`.

    B rows    K classes
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.data import text_models
from dalle_jax.data.labels import Labels
from dalle_jax.data.sources.folder.class_folders import Labelled, labelled
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.distributed.rows import to_host
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import ConfigError
from dalle_jax.models.beit import BEiT
from dalle_jax.priors.losses import cross_entropy, uniform_cross_entropy
from dalle_jax.pytree import PyTree
from dalle_jax.tasks.preview import preview_grid, shown_rows
from dalle_jax.tasks.reconstruction import row_means, row_sums
from dalle_jax.tasks.task import Batch
from dalle_jax.token_layout import PaddedIds

ASSUMED_CLASSES = 1000  # before the data is read
_PREVIEW_ROWS = 16


class LabelTask:
    """The `Task` of BEiT with the target "labels".

    Attributes:
      schedules: none.
      best_metric: "accuracy" on the evaluation split; higher is better.
      title, studies: see `Task`.
      frozen: nothing.
      beit: the model to train.
    """

    schedules: dict[str, optax.Schedule] = {}
    best_metric = "+accuracy"
    title, studies = "BEiT with labels", "images"
    frozen: PyTree = {}

    def __init__(self, beit: BEiT, labels: Labels | None):
        """Creates the task.

        Args:
          beit: the model to train.
          labels: names of the classes for the preview; None if no preview is drawn.
        """
        self.beit, self._labels = beit, labels

    def init(self, key: jax.Array) -> PyTree:
        """See `Task.init`."""
        return self.beit.init(key)

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task.loss`. The batch needs "image", uint8 [B, H, W, 3], and "text", the class, int32 [B, 1].

        The scalar is "accuracy", the share of right classes.
        """
        del frozen, step
        found, smoothing = _per_row(self.beit, params, batch, key), self.beit.options.label_smoothing
        loss = (1 - smoothing) * found["loss"] + smoothing * found["uniform"]
        return jnp.mean(loss), {"accuracy": jnp.mean(found["accuracy"])}

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """See `Task.evaluate`. Returns "loss", without label smoothing, and "accuracy"."""
        del frozen, key
        found = row_means(_measure(self.beit, params, batch) for batch in batches)
        return {name: found[name] for name in ("loss", "accuracy")}

    def preview(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> np.ndarray:
        """Draws images with the class that the model chooses, and the true class if it is another one."""
        del frozen, key
        images, valid, true = to_host((batch["image"], batch["valid"], batch["text"][:, 0]))
        chosen = to_host(_classify(self.beit, params, batch["image"]))
        rows, name = shown_rows(valid, _PREVIEW_ROWS), lambda number: self._labels.decode([int(number)])
        captions = [
            name(chosen[row]) if chosen[row] == true[row] else f"{name(chosen[row])}, not {name(true[row])}"
            for row in rows
        ]
        return preview_grid(captions, [("", images[rows])])

    def in_words(self, metrics: Mapping[str, float], examples: int) -> list[str]:
        """See `Task.in_words`."""
        return [
            f"It names the right one of {self.beit.outputs:,} classes for {metrics['accuracy']:.1%} of {examples:,}."
        ]

    def next_steps(self, config: ConfigDict, workdir: str, batch: Batch, flags: Sequence[str]) -> list[str]:
        """See `Task.next_steps`."""
        del config, batch, flags
        return [f"see what its layers know: python experiments/linear_probe.py --workdir={workdir} --output=DIR"]


def _per_row(beit: BEiT, params: PyTree, batch: Batch, key: jax.Array | None = None) -> dict[str, jax.Array]:
    """Returns loss, loss of the uniform distribution over classes, and accuracy of each row: [B] each."""
    logits, labels = beit(params, batch["image"], None, key), batch["text"][:, 0]
    right = jnp.argmax(logits, axis=-1) == labels
    return {"loss": cross_entropy(logits, labels), "uniform": uniform_cross_entropy(logits), "accuracy": right}


@functools.partial(jax.jit, static_argnums=0)
def _measure(beit: BEiT, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    return row_sums(_per_row(beit, params, batch), batch["valid"])


@functools.partial(jax.jit, static_argnums=0)
def _classify(beit: BEiT, params: PyTree, images: jax.Array) -> jax.Array:
    return jnp.argmax(beit(params, images), axis=-1)


def check_data(options: DataOptions) -> None:
    """Checks that the data may have classes; raises a `ConfigError`."""
    if options.source != "folder":
        raise ConfigError(
            f"config.model.target is 'labels' and config.data.source {options.source!r}. Labels are the names of "
            "folders: give --config.data.source=folder and --config.data.path=DIR."
        )


def ids_of(classes: int) -> PaddedIds:
    """Returns the ids of a "caption" that is a class: one of them in each row."""
    return PaddedIds(classes, 1)


def labelled_splits(options: DataOptions, workdir: str) -> tuple[Labels, Labelled, Labelled]:
    """Opens the training and evaluation split with their classes, and stores the names of these in the workdir.

    The classes of a run that exists already stay, so that its head keeps its meaning.

    Raises:
      DataError: fewer than two classes, or an image whose class the training split lacks.
    """
    sources = [open_source(options, split) for split in (options.train_split, options.eval_split)]
    path = workdirs.text_model_path(workdir)
    stored = text_models.load(path) if path.exists() else None
    splits, classes = labelled(sources, stored.names if isinstance(stored, Labels) else ())
    labels = Labels(len(classes), classes)
    with first_host_first(f"the classes {path}"):
        if stored is None and not path.exists():
            workdirs.save_text_model(workdir, labels)
    return labels, *splits
