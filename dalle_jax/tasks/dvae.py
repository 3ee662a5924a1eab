"""Training of the dVAE by its evidence lower bound (DALL-E, section 2.1 and appendix A.2).

    loss = (−Σ ln f(pixels | code) + β Σ KL(q ‖ uniform)) / (H W 3)

The decoder is trained on relaxed codes (Gumbel-softmax at temperature τ) and used on tokens (the argmax).
`relaxation_gap` measures the difference: the loss with tokens minus the loss with relaxed codes, on the same images. A
gap that stays large means that τ was not low enough for long enough.

    B rows    H, W image    h, w grid    V vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
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
from dalle_jax.image_tokenizers import logit_laplace
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.image_tokenizers.kmeans_init import kmeans_init
from dalle_jax.image_tokenizers.relaxation import gumbel_softmax, kl_to_uniform
from dalle_jax.metrics import codebook
from dalle_jax.optim import schedules
from dalle_jax.pytree import PyTree
from dalle_jax.tasks.reconstruction import ReconstructionTask, decibels, first_images, mean_metrics, row_sums
from dalle_jax.tasks.task import Batch, Job, make_job

# Tokens are decoded for every eighth row of a training batch, which costs little and is enough for the log.
_PROBE_EVERY = 8


@dataclasses.dataclass(frozen=True)
class ObjectiveOptions:
    """How the codes are initialised.

    Attributes:
      init: "paper", or "kmeans": from clusters of patches, for runs of a few thousand updates (`kmeans_init.py`).
      kmeans_sharpness: confidence of the initial codes; see `kmeans_init`.
    """

    init: str = "paper"
    kmeans_sharpness: float = 10.0

    def __post_init__(self):
        check(self, "objective", positive=["kmeans_sharpness"], choices={"init": ("paper", "kmeans")})


class DVAETask(ReconstructionTask):
    """The `Task` of the image tokenizer.

    Attributes:
      schedules: "temperature" and "kl_weight".
      title: see `Task`.
    """

    title = "image tokenizer (dVAE)"

    def __init__(
        self,
        tokenizer: DVAETokenizer,
        temperature: optax.Schedule,
        kl_weight: optax.Schedule,
        start_from: tuple[np.ndarray, float] | None = None,
        held_out: Source | None = None,
    ):
        """Creates the task.

        Args:
          tokenizer: the dVAE to train.
          temperature: τ of the relaxation, by update.
          kl_weight: β, by update.
          start_from: images of the training split, uint8 [n, H, W, 3], and a sharpness. The codes start as clusters of
            the images' patches (`kmeans_init`). None initialises as the paper does.
          held_out: the evaluation split, whose captions the preview shows; None for a preview without captions.
        """
        super().__init__(tokenizer, held_out)
        self._start_from = start_from
        self.schedules = {"temperature": temperature, "kl_weight": kl_weight}

    def init(self, key: jax.Array) -> PyTree:
        """See `Task.init`."""
        boxed = self.tokenizer.init(key)
        if self._start_from is None:
            return boxed
        images, sharpness = self._start_from
        key = keys.stream(key, "kmeans")
        params = kmeans_init(self.tokenizer, nn.meta.unbox(boxed), images, key, sharpness=sharpness)
        return nn.meta.replace_boxed(boxed, params)

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task.loss`. The batch needs "image", uint8 [B, H, W, 3].

        The scalars are:
          reconstruction_nats: −ln f of the pixels given relaxed codes, nats per subpixel.
          kl_nats: KL(q ‖ uniform), nats per grid position.
          elbo: the bound (β = 1), nats per subpixel; higher is better.
          codebook_perplexity, codebook_usage: of the tokens of the batch.
          psnr: of images decoded from tokens, dB, for every eighth row.
          relaxation_gap: loss with tokens minus loss with relaxed codes, nats per subpixel, for every eighth row.
        """
        del frozen
        images = batch["image"]
        subpixels = images[0].size
        logits = self.tokenizer.encode_logits(params, images)
        codes = gumbel_softmax(logits, key, self.schedules["temperature"](step))
        pixel_nats = _nats_per_row(images, *self.tokenizer.decode_maps(params, codes))
        kl = jnp.sum(kl_to_uniform(logits), axis=(1, 2))
        loss = jnp.mean(pixel_nats + self.schedules["kl_weight"](step) * kl / subpixels)

        tokens = jnp.argmax(jax.lax.stop_gradient(logits), axis=-1)
        counts = codebook.count(tokens, self.tokenizer.vocab_size)
        probe = slice(None, None, _PROBE_EVERY)
        true_nats, squared_error = _errors(self.tokenizer, jax.lax.stop_gradient(params), images[probe], tokens[probe])
        return loss, {
            "reconstruction_nats": jnp.mean(pixel_nats),
            "kl_nats": jnp.mean(kl) / tokens[0].size,
            "elbo": -jnp.mean(pixel_nats + kl / subpixels),
            "codebook_perplexity": codebook.perplexity(counts),
            "codebook_usage": codebook.usage(counts),
            "psnr": decibels(jnp.mean(squared_error)),
            "relaxation_gap": jnp.mean(true_nats - pixel_nats[probe]),
        }

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """See `Task.evaluate`. All metrics are of images decoded from tokens, because sampling decodes tokens.

        The metrics are:
          mse: mean squared error of pixels in [0, 1].
          psnr: of the mean squared error over all images, dB.
          reconstruction_nats, kl_nats, elbo: as in `loss`.
          codebook_perplexity, codebook_usage: of the tokens of all batches together.
        """
        del frozen, key
        return mean_metrics(_measure(self.tokenizer, params, batch) for batch in batches)


# This is a function of the tokenizer, not a method of the task, because `jax.jit` keeps its static arguments alive.
@functools.partial(jax.jit, static_argnums=0)
def _measure(tokenizer: DVAETokenizer, params: PyTree, batch: Batch) -> dict[str, jax.Array]:
    """Returns sums over the valid rows of a batch: scalars, and the counts of the codes, float32 [V]."""
    images, valid = batch["image"], batch["valid"]
    logits = tokenizer.encode_logits(params, images)
    tokens = jnp.argmax(logits, axis=-1)
    kl = jnp.sum(kl_to_uniform(logits), axis=(1, 2))
    pixel_nats, squared_error = _errors(tokenizer, params, images, tokens)
    per_row = {
        "mse": squared_error,
        "reconstruction_nats": pixel_nats,
        "kl_nats": kl / tokens[0].size,
        "elbo": -(pixel_nats + kl / images[0].size),
    }
    return {**row_sums(per_row, valid), "counts": codebook.count(tokens, tokenizer.vocab_size, valid)}


def _errors(
    tokenizer: DVAETokenizer, params: PyTree, images: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Measures images decoded from their tokens: nats per subpixel and mean squared error in [0, 1], [B] each."""
    mean, log_scale = tokenizer.decode_maps(params, tokens)
    error = logit_laplace.to_pixels(mean) - images.astype(jnp.float32) / 255
    return _nats_per_row(images, mean, log_scale), jnp.mean(error**2, axis=(1, 2, 3))


def _nats_per_row(images: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Returns −ln f of uint8 images [B, H, W, 3] under μ and ln b of that shape: nats per subpixel, [B]."""
    return -jnp.mean(logit_laplace.log_prob(logit_laplace.map_pixels(images), mean, log_scale), axis=(1, 2, 3))


def _task(
    config: ConfigDict, start_from: tuple[np.ndarray, float] | None = None, held_out: Source | None = None
) -> DVAETask:
    """Builds the task of a configuration."""
    temperature, kl_weight = (schedules.make(config.schedules[name], name) for name in ("temperature", "kl_weight"))
    return DVAETask(tokenizers.of_training(config), temperature, kl_weight, start_from, held_out)


def check_config(config: ConfigDict) -> None:
    """See `registry.check_config`."""
    from_config(DataOptions, config.data, "data")
    from_config(ObjectiveOptions, config.objective, "objective")
    _task(config)


def build(config: ConfigDict, workdir: str, rows: Sequence[int] | None = None) -> Job:
    """Builds the job of `configs/dvae.py`.

    Raises:
      ConfigError: an unknown key, or sizes that do not fit each other.
      DataError: the data cannot be opened.
    """
    del workdir
    objective = from_config(ObjectiveOptions, config.objective, "objective")
    options = from_config(DataOptions, config.data, "data")
    start_from = None
    if objective.init == "kmeans":
        start_from = first_images(options, config), objective.kmeans_sharpness
    held_out = open_source(options, options.eval_split)
    return make_job(_task(config, start_from, held_out), config, options, rows, held_out=held_out)


def abstract(config: ConfigDict) -> tuple[DVAETask, Batch]:
    """See `registry.abstract`. The initial codes are no part of the train step."""
    return _task(config), batch_shapes(config.data.image_size, None, config.batch_size)


def options(config: Mapping[str, Any]) -> dict[str, type]:
    """See `tasks.options`."""
    del config
    return {"model": DVAEOptions, "objective": ObjectiveOptions}
