"""Training of the small vector-quantised image tokenizer: mean squared error of pixels, and commitment.

    loss = mean (x' − x)² + commitment · mean (z − sg(e))²

Pixels x lie in [-1, 1]. The codes e are running averages (`image_tokenizers/vector_quantizer.py`), renewed after each
update. Training decodes the very codes that tokens stand for, so it has no gap to their use, unlike the paper's
relaxation.

    B rows    H, W image    V codes
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dalle_jax import keys
from dalle_jax.configuration.options import check, from_config
from dalle_jax.data.examples import batch_shapes
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, Source
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.signed_pixels import from_signed, to_signed
from dalle_jax.image_tokenizers.vector_quantizer import quantize, renew
from dalle_jax.image_tokenizers.vq import VQTokenizer
from dalle_jax.image_tokenizers.vq_network import VQOptions
from dalle_jax.image_tokenizers.vq_start import start_from_blocks
from dalle_jax.metrics import codebook
from dalle_jax.pytree import PyTree
from dalle_jax.tasks.reconstruction import ReconstructionTask, decibels, first_images
from dalle_jax.tasks.task import Batch, Job, make_job


@dataclasses.dataclass(frozen=True)
class VQObjectiveOptions:
    """The loss of the vector-quantised tokenizer, and its start.

    Attributes:
      init: "blocks": principal components and clusters of blocks of training images (`vq_start.py`); "random".
      commitment: weight of the term that moves features to their codes.
      code_decay: weight of the old averages when codes are renewed.
      dead_below: a code with a smaller share of all uses than dead_below / V is moved to where the error is large.
    """

    init: str = "blocks"
    commitment: float = 0.25
    code_decay: float = 0.99
    dead_below: float = 0.03

    def __post_init__(self):
        check(
            self, "objective", at_least_0=["commitment"], below_1=["code_decay", "dead_below"],
            choices={"init": ("blocks", "random")},
        )  # fmt: skip


class VQTask(ReconstructionTask):
    """The `Task` of the vector-quantised tokenizer.

    Attributes:
      schedules: none.
      title: see `Task`.
    """

    schedules: Mapping[str, optax.Schedule] = {}
    title = "image tokenizer (vector-quantised)"

    def __init__(
        self,
        tokenizer: VQTokenizer,
        objective: VQObjectiveOptions,
        start_images: np.ndarray | None = None,
        held_out: Source | None = None,
    ):
        """Creates the task.

        Args:
          tokenizer: the tokenizer to train.
          objective: weights of the loss.
          start_images: images of the training split to start from, uint8 [n, H, W, 3]; None for a random start.
          held_out: the evaluation split, whose captions the preview shows; None for a preview without captions.
        """
        super().__init__(tokenizer, held_out)
        self.objective, self._start_images = objective, start_images

    def init(self, key: jax.Array) -> PyTree:
        """See `Task.init`."""
        boxed = self.tokenizer.init(key)
        if self._start_images is None:
            return boxed
        key = keys.stream(key, "blocks")
        params = start_from_blocks(self.tokenizer, nn.meta.unbox(boxed), self._start_images, key)
        return nn.meta.replace_boxed(boxed, params)

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task.loss`. The batch needs "image", uint8 [B, H, W, 3].

        The scalars are:
          reconstruction: mean squared error of pixels in [-1, 1].
          commitment: mean squared distance of features to their codes.
          codebook_perplexity, codebook_usage: of the tokens of the batch.
          psnr: of images decoded from tokens, dB.
        "statistics" are those of `vector_quantizer.quantize`, for `after_update`.
        """
        del frozen, key, step
        images = batch["image"]
        features = self.tokenizer.features(params, images)
        found = quantize(features.reshape(-1, features.shape[-1]), params["codes"]["vectors"])
        decoded = self.tokenizer.decode_vectors(params, found.vectors.reshape(features.shape))
        reconstruction = jnp.mean((decoded - to_signed(images)) ** 2)
        squared_error = jnp.mean((from_signed(decoded) - images.astype(jnp.float32) / 255) ** 2)
        counts = codebook.count(found.tokens.reshape(features.shape[:-1]), self.tokenizer.vocab_size)
        return reconstruction + self.objective.commitment * found.commitment, {
            "statistics": found.statistics,
            "reconstruction": reconstruction,
            "commitment": found.commitment,
            "codebook_perplexity": codebook.perplexity(counts),
            "codebook_usage": codebook.usage(counts),
            "psnr": decibels(squared_error),
        }

    def after_update(self, params: PyTree, statistics: PyTree, key: jax.Array) -> PyTree:
        """See `Task.after_update`: renews the codes."""
        o = self.objective
        codes = renew(params["codes"], statistics, key, decay=o.code_decay, dead_below=o.dead_below)
        return {**params, "codes": codes}


def check_config(config: ConfigDict) -> None:
    """See `registry.check_config`."""
    from_config(DataOptions, config.data, "data")
    abstract(config)


def build(config: ConfigDict, workdir: str, rows: Sequence[int] | None = None) -> Job:
    """Builds the job of a vector-quantised variant of `configs/dvae.py`.

    Raises:
      ConfigError: an unknown key, or sizes that do not fit each other.
      DataError: the data cannot be opened.
    """
    del workdir
    objective = from_config(VQObjectiveOptions, config.objective, "objective")
    options = from_config(DataOptions, config.data, "data")
    start_images = first_images(options, config) if objective.init == "blocks" else None
    held_out = open_source(options, options.eval_split)
    task = VQTask(tokenizers.of_training(config), objective, start_images, held_out)
    return make_job(task, config, options, rows, held_out=held_out)


def abstract(config: ConfigDict) -> tuple[VQTask, Batch]:
    """See `registry.abstract`. The start from images is no part of the train step."""
    objective = from_config(VQObjectiveOptions, config.objective, "objective")
    task = VQTask(tokenizers.of_training(config), objective)
    return task, batch_shapes(config.data.image_size, None, config.batch_size)


def options(config: Mapping[str, Any]) -> dict[str, type]:
    """See `tasks.options`."""
    del config
    return {"model": VQOptions, "objective": VQObjectiveOptions}
