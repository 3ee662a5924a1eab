"""Training of the VQGAN: two players in one update (taming transformers, arXiv 2012.09841, section 3.1).

    generator      pixels + perceptual + w λ adversarial + codebook + commitment
    discriminator  weight of the discriminator x (real against fake + R1 + LeCam)

w is the schedule `adversarial_weight`, and λ the adaptive weight: the ratio of the gradients of reconstruction and
adversarial loss at the decoder's last layer. The generator's loss has no gradient for the discriminator, and that of
the discriminator has none for the reconstruction. One backward pass over their sum therefore gives each player its own
gradient. Both players move at once, from the same reconstructions. The authors' code updates the generator first, and
then computes the reconstructions again for the discriminator.

Before the discriminator starts (`discriminator_weight`, `adversarial_weight`), neither of the two is computed.

The discriminator and running averages are trained next to the tokenizer's parameters, under the names "discriminator"
and "running". A prior reads the tokenizer's own parameters only.

    B rows    H, W image    h, w grid    V codes    D code width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dalle_jax import keys
from dalle_jax.configuration.options import from_config
from dalle_jax.data.examples import batch_shapes
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, Source
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.adversarial import adaptive_weight, with_gradient
from dalle_jax.image_tokenizers.discriminator import Discriminator, DiscriminatorOptions, discriminator_flops
from dalle_jax.image_tokenizers.kmeans_init import kmeans
from dalle_jax.image_tokenizers.signed_pixels import from_signed, to_signed
from dalle_jax.image_tokenizers.vector_quantizer import averages, move_dead, renew
from dalle_jax.image_tokenizers.vqgan import VQGANTokenizer
from dalle_jax.image_tokenizers.vqgan_options import VQGANOptions
from dalle_jax.metrics import codebook
from dalle_jax.optim import schedules
from dalle_jax.pytree import PyTree
from dalle_jax.tasks import perceptual
from dalle_jax.tasks.perceptual import Perceptual
from dalle_jax.tasks.reconstruction import ReconstructionTask, decibels, first_images, mean_metrics, row_sums
from dalle_jax.tasks.task import Batch, Job, make_job
from dalle_jax.tasks.vqgan_losses import VQGANObjectiveOptions, fidelity, play, quantized, relaxed

_LAST = ("decoder", "output", "kernel")  # the decoder's last layer, where gradients are compared
_SCHEDULES = ("adversarial_weight", "discriminator_weight")
_OF_GUMBEL = ("temperature", "kl_weight")
_START_FEATURES = 32_768  # for the clusters that codes start from
_AT_ONCE = 32  # images that pass through the encoder for it


class VQGANTask(ReconstructionTask):
    """The `Task` of the VQGAN.

    Attributes:
      schedules: "adversarial_weight" and "discriminator_weight"; with the quantiser "gumbel", "temperature" and
        "kl_weight".
      title: see `Task`.
      best_metric: the perceptual distance if it is measured, else PSNR, which falls when the adversarial loss begins.
    """

    title = "image tokenizer (VQGAN)"

    def __init__(
        self,
        tokenizer: VQGANTokenizer,
        objective: VQGANObjectiveOptions,
        discriminator: DiscriminatorOptions,
        schedules: Mapping[str, optax.Schedule],
        perceptual: tuple[Perceptual, PyTree] | None = None,
        start_images: np.ndarray | None = None,
        held_out: Source | None = None,
    ):
        """Creates the task.

        Args:
          tokenizer: the tokenizer to train.
          objective: losses and their weights.
          discriminator: its sizes.
          schedules: see the attribute.
          perceptual: the perceptual loss and its parameters; None without one.
          start_images: images of the training split, uint8 [n, H, W, 3], from whose features codes start; or None.
          held_out: the evaluation split, whose captions the preview shows; None for a preview without captions.

        Raises:
          ConfigError: the images are too small for the discriminator or for LPIPS.
        """
        super().__init__(tokenizer, held_out)
        discriminator.check_size(tokenizer.image_size)
        self.objective, self.schedules, self._start_images = objective, schedules, start_images
        self._discriminator = Discriminator(discriminator)
        self._perceptual = None
        if perceptual is not None:
            self._perceptual, self.frozen = perceptual[0], {"perceptual": perceptual[1]}
            self.best_metric, smallest = self._perceptual.name, self._perceptual.smallest_side
            if tokenizer.image_size < smallest:
                raise ConfigError(
                    f"config.data.image_size is {tokenizer.image_size}: {self.best_metric} needs at least {smallest} "
                    "pixels. Set config.objective.perceptual_weight=0."
                )

    def _logits(self, params: PyTree, pixels: jax.Array) -> jax.Array:
        """Computes the discriminator's logits [B, h, w] of pixels, float32 [B, H, W, 3] in [-1, 1]."""
        return self._discriminator.apply({"params": params}, pixels)

    @property
    def _nearest(self) -> bool:
        return self.tokenizer.options.quantizer == "nearest"

    # -- parameters -----------------------------------------------------------------------------------------------

    def init(self, key: jax.Array) -> PyTree:
        """See `Task.init`."""
        params = self.tokenizer.init(keys.stream(key, "tokenizer"))
        if self._start_images is not None:
            plain, key_ = nn.meta.unbox(params), keys.stream(key, "clusters")
            codes = {"codes": {"vectors": _clusters(self.tokenizer, plain, self._start_images, key_)}}
            params = nn.meta.replace_boxed(params, {**plain, **codes})
        side = self.tokenizer.image_size
        discriminator = self._discriminator.init(keys.stream(key, "discriminator"), jnp.zeros((1, side, side, 3)))
        running = {name: nn.LogicallyPartitioned(jnp.zeros(()), ()) for name in ("real", "fake")}
        if self._nearest:
            count = self.tokenizer.vocab_size
            starts = {"uses": jnp.ones(count), "errors": jnp.zeros(count)}
            running |= {name: nn.LogicallyPartitioned(value, ("codebook",)) for name, value in starts.items()}
        return {**params, "discriminator": discriminator["params"], "running": running}

    def after_update(self, params: PyTree, statistics: PyTree, key: jax.Array) -> PyTree:
        """See `Task.after_update`: renews the running averages, moves dead codes, and renews averaged codes."""
        o, running = self.objective, dict(params["running"])
        for name in ("real", "fake"):
            moved = o.code_decay * running[name] + (1 - o.code_decay) * statistics[name]
            running[name] = jnp.where(statistics["playing"] > 0, moved, running[name])
        if not self._nearest:
            return {**params, "running": running}
        codes = {**params["codes"], "uses": running["uses"], "errors": running["errors"]}
        if o.codes == "average":
            codes = renew(codes, statistics, key, decay=o.code_decay, dead_below=o.dead_below)
        else:
            codes = move_dead(codes["vectors"], *averages(codes, statistics, o.code_decay), key, o.dead_below)
        vectors = codes.pop("vectors")
        return {**params, "codes": {"vectors": vectors}, "running": {**running, **codes}}

    # -- losses ---------------------------------------------------------------------------------------------------

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task.loss`. The batch needs "image", uint8 [B, H, W, 3].

        The value is the generator's loss. The discriminator's adds its gradient only.

        The scalars are:
          pixel_loss, perceptual_loss: without weights; the second one only if it has a weight.
          codebook_loss, commitment, entropy_loss; kl_nats with the quantiser "gumbel": without weights.
          generator_loss, discriminator_loss: of the two players, without their schedules; 0 before they start.
          logits_real, logits_fake: means over patches. The discriminator raises the first and lowers the second.
          adaptive_weight: λ, 0 before the game starts; 1 without `adaptive`.
          r1_penalty: the squared gradient norm, if it has a weight.
          codebook_perplexity, codebook_usage: of the tokens of the batch.
          psnr: of the reconstructions, dB.
        """
        o, images = self.objective, batch["image"]
        distance = None
        if self._perceptual is not None:
            distance = functools.partial(self._perceptual.distance, frozen["perceptual"])
        pixels = to_signed(images)
        if self._nearest:
            coded = quantized(o, self.tokenizer, params, images)
        else:
            coded = relaxed(self.tokenizer, params, images, key, *(self.schedules[name](step) for name in _OF_GUMBEL))
        # The pullback gives gradients for the last kernel only, from gradients for the reconstruction.
        decode = lambda kernel: self.tokenizer.signed(
            self.tokenizer.decode_vectors(_with_last(params, kernel), coded.vectors)
        )
        reconstruction, for_last = jax.vjp(decode, _last(params))
        fixed = jax.lax.stop_gradient(reconstruction)

        measure = functools.partial(fidelity, o, distance, pixels)
        (nll, scalars), gradient = jax.value_and_grad(measure, has_aux=True)(fixed)
        weight, discriminator_weight = (self.schedules[name](step) for name in _SCHEDULES)
        playing = (weight > 0) | (discriminator_weight > 0)
        running = jax.lax.stop_gradient(params["running"])
        game = play(o, self._logits, params["discriminator"], running, pixels, fixed, playing)
        adaptive = jnp.float32(1.0)
        if o.adaptive:
            at_last = (for_last(jax.lax.stop_gradient(x))[0] for x in (gradient, game.gradient))
            adaptive = jnp.where(playing, adaptive_weight(*at_last), 0.0)
        weight = weight * adaptive
        generator = with_gradient(nll + weight * game.generator, gradient + weight * game.gradient, reconstruction)
        discriminator = discriminator_weight * game.discriminator

        counts = codebook.count(coded.tokens, self.tokenizer.vocab_size)
        squared_error = jnp.mean((from_signed(fixed) - images.astype(jnp.float32) / 255) ** 2)
        scalars |= coded.scalars | {
            "generator_loss": game.generator,
            "discriminator_loss": game.discriminator,
            "logits_real": game.real,
            "logits_fake": game.fake,
            "adaptive_weight": adaptive,
            "codebook_perplexity": codebook.perplexity(counts),
            "codebook_usage": codebook.usage(counts),
            "psnr": decibels(squared_error),
        }
        if o.r1:
            scalars["r1_penalty"] = game.r1
        players = {"real": game.real, "fake": game.fake, "playing": playing.astype(jnp.float32)}
        scalars = jax.lax.stop_gradient({**scalars, "statistics": {**coded.statistics, **players}})
        return generator + coded.loss + discriminator - jax.lax.stop_gradient(discriminator), scalars

    def training_flops(self, image_size: int) -> float:
        """See `ReconstructionTask.training_flops`. The discriminator counts as if it had started."""
        game = discriminator_flops(self._discriminator.options, image_size)
        images = 3  # both of a pair, and the gradient of one
        distances = images * self._perceptual.flops(image_size) if self._perceptual else 0.0
        return super().training_flops(image_size) + game + distances

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """See `ReconstructionTask.evaluate`. The mean of the perceptual loss over images has its name."""
        if self._perceptual is None:
            return super().evaluate(params, frozen, batches, key)
        measure = functools.partial(_measure, self.tokenizer, self._perceptual, params, frozen["perceptual"])
        return mean_metrics(measure(batch) for batch in batches)


def _last(params: PyTree) -> jax.Array:
    return functools.reduce(lambda part, name: part[name], _LAST, params)


def _with_last(params: PyTree, kernel: jax.Array) -> PyTree:
    """Returns parameters with another kernel of the decoder's last layer."""
    part, layer, name = _LAST
    return {**params, part: {**params[part], layer: {**params[part][layer], name: kernel}}}


def _clusters(tokenizer: VQGANTokenizer, params: PyTree, images: np.ndarray, key: jax.Array) -> jax.Array:
    """Returns the centres of the features of images, uint8 [n, H, W, 3]: float32 [V, D]."""
    chosen_key, kmeans_key = jax.random.split(key)
    images = jax.lax.optimization_barrier(jnp.asarray(images))  # else XLA spends a minute on folding constants
    features = jax.lax.map(lambda one: tokenizer.features(params, one[None])[0], images, batch_size=_AT_ONCE)
    features = features.reshape(-1, features.shape[-1])
    chosen = features[jax.random.permutation(chosen_key, len(features))[:_START_FEATURES]]
    return kmeans(chosen, tokenizer.vocab_size, kmeans_key)[0]


# This is a function of the tokenizer, not a method of the task, because `jax.jit` keeps its static arguments alive.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    tokenizer: VQGANTokenizer, perceptual: Perceptual, params: PyTree, distance_params: PyTree, batch: Batch
) -> dict[str, jax.Array]:
    """Returns sums over the valid rows of a batch: scalars, and the counts of the codes, float32 [V]."""
    images, valid = batch["image"], batch["valid"]
    tokens = tokenizer.encode(params, images)
    decoded = tokenizer.decode(params, tokens)
    per_row = {
        "mse": jnp.mean((decoded - images.astype(jnp.float32) / 255) ** 2, axis=(1, 2, 3)),
        perceptual.name: perceptual.distance(distance_params, to_signed(images), 2 * decoded - 1),
    }
    return {**row_sums(per_row, valid), "counts": codebook.count(tokens, tokenizer.vocab_size, valid)}


# -- from a configuration -----------------------------------------------------------------------------------------


def _task(
    config: ConfigDict,
    read_perceptual: Callable[[VQGANObjectiveOptions], tuple[Perceptual, PyTree] | None],
    start_images: Callable[[], np.ndarray] | None = None,
    held_out: Source | None = None,
) -> VQGANTask:
    """Builds the task of a configuration.

    Args:
      config: the configuration.
      read_perceptual: returns the perceptual loss of an objective.
      start_images: reads the images that codes start from; None for random codes.
      held_out: see `VQGANTask`.
    """
    objective = from_config(VQGANObjectiveOptions, config.objective, "objective")
    discriminator = from_config(DiscriminatorOptions, config.discriminator, "discriminator")
    tokenizer = tokenizers.of_training(config)
    nearest = tokenizer.options.quantizer == "nearest"
    names = _SCHEDULES if nearest else (*_SCHEDULES, *_OF_GUMBEL)
    made = {name: schedules.make(config.schedules[name], name) for name in names}
    start = start_images() if start_images and nearest and objective.init == "clusters" else None
    return VQGANTask(tokenizer, objective, discriminator, made, read_perceptual(objective), start, held_out)


def check_config(config: ConfigDict) -> None:
    """See `registry.check_config`."""
    from_config(DataOptions, config.data, "data")
    perceptual.check(from_config(VQGANObjectiveOptions, config.objective, "objective"))
    _task(config, perceptual.abstract)


def build(config: ConfigDict, workdir: str, rows: Sequence[int] | None = None) -> Job:
    """Builds the job of `configs/vqgan.py`.

    Raises:
      ConfigError: an unknown key, sizes that do not fit each other, or no weights of the perceptual loss.
      DataError: the data cannot be opened.
    """
    del workdir
    options = from_config(DataOptions, config.data, "data")
    held_out = open_source(options, options.eval_split)
    task = _task(config, perceptual.load, lambda: first_images(options, config), held_out)
    return make_job(task, config, options, rows, held_out=held_out)


def abstract(config: ConfigDict) -> tuple[VQGANTask, Batch]:
    """See `registry.abstract`. The start from images is no part of the train step."""
    return _task(config, perceptual.abstract), batch_shapes(config.data.image_size, None, config.batch_size)


def options(config: Mapping[str, Any]) -> dict[str, type]:
    """See `tasks.options`."""
    del config
    return {"model": VQGANOptions, "objective": VQGANObjectiveOptions, "discriminator": DiscriminatorOptions}
