"""The losses of a VQGAN's training, and their options: fidelity, codes, and the game of its two players.

B batch    H, W image    h, w grid    V codes    D code width
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Key, UInt8

from dalle_jax.configuration.options import check
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.adversarial import (
    LOSSES,
    discriminator_loss,
    generator_loss,
    lecam_penalty,
    r1_penalty,
)  # fmt: skip
from dalle_jax.image_tokenizers.relaxation import gumbel_softmax, kl_to_uniform
from dalle_jax.image_tokenizers.vector_quantizer import codebook_loss, entropy_loss, quantize
from dalle_jax.image_tokenizers.vqgan import VQGANTokenizer
from dalle_jax.pytree import PyTree


@dataclasses.dataclass(frozen=True)
class VQGANObjectiveOptions:
    """The losses of the VQGAN.

    Attributes:
      pixel_loss: "l1" or "l2", a mean over pixels in [-1, 1].
      pixel_weight: its weight.
      perceptual_weight: weight of the perceptual loss. Above 0, it needs `lpips` or `clip`.
      lpips: folder with the weights of LPIPS, which `python -m dalle_jax.pretrained lpips` writes.
      clip: folder of a CLIP, whose image tower takes the place of LPIPS; see `clip/distance.py`.
      adversarial: "hinge", "vanilla" or "non_saturating", see `adversarial.LOSSES`.
      adaptive: whether the adversarial loss is multiplied by the ratio of gradients at the last layer.
      r1: weight of the squared gradient norm at real images; 0 saves the second derivative.
      lecam: weight of the LeCam regularisation.
      codes: "gradient": codes follow the codebook loss; "average": each is a running average of its features. Only
        with model.quantizer=nearest, as all that follows.
      codebook, commitment: weights of ‖sg(z) − e‖² and of ‖z − sg(e)‖². Averages use the second one only.
      entropy, entropy_temperature: weight of the entropy loss, and what divides the distances in it.
      init: "random", or "clusters": codes start as clusters of the untrained encoder's features of training images.
      code_decay: weight of the old averages of uses, errors and, with codes="average", of codes.
      dead_below: a code with a smaller share of all uses than dead_below / V is moved to where the error is large.
    """

    pixel_loss: str = "l1"
    pixel_weight: float = 1.0
    perceptual_weight: float = 1.0
    lpips: str | None = None
    clip: str | None = None
    adversarial: str = "hinge"
    adaptive: bool = True
    r1: float = 0.0
    lecam: float = 0.0
    codes: str = "gradient"
    codebook: float = 1.0
    commitment: float = 0.25
    entropy: float = 0.0
    entropy_temperature: float = 0.01
    init: str = "random"
    code_decay: float = 0.99
    dead_below: float = 0.0

    def __post_init__(self):
        weights = ["pixel_weight", "perceptual_weight", "r1", "lecam", "codebook", "commitment", "entropy"]
        choices = {
            "pixel_loss": ("l1", "l2"), "adversarial": LOSSES, "codes": ("gradient", "average"),
            "init": ("random", "clusters"),
        }  # fmt: skip
        check(
            self, "objective", positive=["entropy_temperature"], at_least_0=weights,
            below_1=["code_decay", "dead_below"], choices=choices,
        )  # fmt: skip
        given = {name: folder for name in ("lpips", "clip") if (folder := getattr(self, name)) is not None}
        if given and not self.perceptual_weight:
            name, folder = next(iter(given.items()))
            raise ConfigError(
                f"config.objective.{name} is {folder!r}, and config.objective.perceptual_weight is 0, so that it "
                "would not be used. Set --config.objective.perceptual_weight=1."
            )
        if len(given) > 1:
            raise ConfigError(
                f"config.objective.lpips is {self.lpips!r} and config.objective.clip is {self.clip!r}: a training has "
                "one perceptual loss. Leave one of the two out."
            )


class Coded(NamedTuple):
    """Features after quantisation.

    Attributes:
      tokens: int32 [B, h, w].
      vectors: what the decoder reads, with a gradient for the encoder, float32 [B, h, w, D].
      loss: the weighted losses of codes and features, float32 scalar.
      scalars: these losses alone, for the log.
      statistics: for `after_update`.
    """

    tokens: jax.Array
    vectors: jax.Array
    loss: jax.Array
    scalars: dict[str, jax.Array]
    statistics: dict[str, jax.Array]


class Game(NamedTuple):
    """The discriminator's side of an update: float32 scalars, and one gradient.

    Attributes:
      generator: the generator's adversarial loss.
      gradient: its gradient for the reconstruction, float32 [B, H, W, 3].
      discriminator: the discriminator's loss with its penalties.
      real, fake: mean logits of real images and of reconstructions.
      r1: the squared gradient norm; 0 if it has no weight.
    """

    generator: jax.Array
    gradient: jax.Array
    discriminator: jax.Array
    real: jax.Array
    fake: jax.Array
    r1: jax.Array


def quantized(
    o: VQGANObjectiveOptions, tokenizer: VQGANTokenizer, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]
) -> Coded:
    """Encodes images and replaces features by their nearest codes.

    Args:
      o: weights of the losses.
      tokenizer: a tokenizer with quantizer="nearest".
      params: unboxed parameters.
      images: uint8 [B, H, W, 3].
    """
    features, codes = tokenizer.features(params, images), tokenizer.codebook(params)
    flat = features.reshape(-1, features.shape[-1])
    found = quantize(flat, codes)
    scalars = {"commitment": found.commitment}
    loss = o.commitment * found.commitment
    if o.codes == "gradient":
        scalars["codebook_loss"] = codebook_loss(flat, codes, found.tokens)
        loss += o.codebook * scalars["codebook_loss"]
    if o.entropy:
        scalars["entropy_loss"] = entropy_loss(flat, codes, o.entropy_temperature)
        loss += o.entropy * scalars["entropy_loss"]
    tokens, vectors = found.tokens.reshape(features.shape[:-1]), found.vectors.reshape(features.shape)
    return Coded(tokens, vectors, loss, scalars, found.statistics)


def relaxed(
    tokenizer: VQGANTokenizer,
    params: PyTree,
    images: UInt8[ArrayLike, "B H W 3"],
    key: Key[Array, ""],
    temperature: Float[ArrayLike, ""],
    kl_weight: Float[ArrayLike, ""],
) -> Coded:
    """Encodes images and draws a code for each feature by Gumbel-softmax, straight-through as in GumbelVQ.

    Args:
      tokenizer: a tokenizer with quantizer="gumbel".
      params: unboxed parameters.
      images: uint8 [B, H, W, 3].
      key: scalar key of the noise.
      temperature: of the relaxation, which the gradient sees.
      kl_weight: weight of KL(q ‖ uniform), nats per position.
    """
    logits = tokenizer.code_logits(params, tokenizer.features(params, images))
    soft = gumbel_softmax(logits, key, temperature)
    hard = jax.nn.one_hot(jnp.argmax(soft, axis=-1), soft.shape[-1])
    vectors = (soft + jax.lax.stop_gradient(hard - soft)) @ tokenizer.codebook(params)
    kl = jnp.mean(kl_to_uniform(logits))
    return Coded(jnp.argmax(logits, axis=-1), vectors, kl_weight * kl, {"kl_nats": kl}, {})


def fidelity(
    o: VQGANObjectiveOptions,
    distance: Callable[[jax.Array, jax.Array], jax.Array] | None,
    pixels: Float[ArrayLike, "B H W 3"],
    reconstruction: Float[ArrayLike, "B H W 3"],
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the weighted sum of pixel and perceptual losses, and both alone.

    Args:
      o: weights of the losses.
      distance: compares two batches of pixels, float32 [B]; None without a perceptual loss.
      pixels, reconstruction: float32 [B, H, W, 3] in about [-1, 1].
    """
    error = reconstruction - pixels
    scalars = {"pixel_loss": jnp.mean(jnp.abs(error) if o.pixel_loss == "l1" else error**2)}
    loss = o.pixel_weight * scalars["pixel_loss"]
    if distance is not None:
        scalars["perceptual_loss"] = jnp.mean(distance(pixels, reconstruction))
        loss += o.perceptual_weight * scalars["perceptual_loss"]
    return loss, scalars


def play(
    o: VQGANObjectiveOptions,
    logits: Callable[[PyTree, jax.Array], jax.Array],
    discriminator: PyTree,
    averages: Mapping[str, jax.Array],
    pixels: Float[ArrayLike, "B H W 3"],
    fake: Float[ArrayLike, "B H W 3"],
    playing: Bool[ArrayLike, ""],
) -> Game:
    """Computes the losses of both players.

    Args:
      o: kinds and weights of the losses.
      logits: maps parameters of the discriminator and pixels to logits [B, h, w].
      discriminator: its parameters. Only the discriminator's loss has a gradient for them.
      averages: "real" and "fake", running averages of mean logits.
      pixels: real images, float32 [B, H, W, 3] in [-1, 1].
      fake: their reconstructions, without a gradient.
      playing: false: nothing is computed, and all results are 0.
    """

    def play(discriminator: PyTree) -> Game:
        opponent = jax.lax.stop_gradient(discriminator)  # else the branch keeps values for a second derivative
        scored = lambda x: generator_loss(o.adversarial, logits(opponent, x))
        generator, gradient = jax.value_and_grad(scored)(fake)
        of_real, of_fake = logits(discriminator, pixels), logits(discriminator, fake)
        loss = discriminator_loss(o.adversarial, of_real, of_fake)
        r1 = r1_penalty(functools.partial(logits, discriminator), pixels) if o.r1 else jnp.float32(0.0)
        if o.lecam:
            loss += o.lecam * lecam_penalty(of_real, of_fake, averages["real"], averages["fake"])
        return Game(generator, gradient, loss + o.r1 * r1, jnp.mean(of_real), jnp.mean(of_fake), r1)

    def wait(_: PyTree) -> Game:
        zero = jnp.float32(0.0)
        return Game(zero, jnp.zeros_like(fake), zero, zero, zero, zero)

    return jax.lax.cond(playing, play, wait, discriminator)
