"""The VQGAN (`vqgan_network.py`) as an `ImageTokenizer`.

B batch    H, W image    h, w grid, H = downsample * h    V codes    D code width
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from dalle_jax.image_tokenizers.flops import Flops, vqgan_flops
from dalle_jax.image_tokenizers.quantized_tokenizer import QuantizedTokenizer
from dalle_jax.image_tokenizers.vqgan_network import VQGAN
from dalle_jax.image_tokenizers.vqgan_options import VQGANOptions
from dalle_jax.pytree import PyTree


@dataclasses.dataclass(frozen=True)
class VQGANTokenizer(QuantizedTokenizer):
    """The VQGAN. All methods are pure functions of the parameters.

    Attributes:
      options: sizes.
    """

    options: VQGANOptions
    kind = "vqgan"
    network = VQGAN

    def scaled(self, images: UInt8[ArrayLike, "*axes"]) -> Float[ArrayLike, "*axes"]:
        """Maps uint8 pixels to the scale of the network, float32 in [-1, 1] or in [0, 1] (`pixel_range`)."""
        unit = self.options.pixel_range == "unit"
        return images.astype(jnp.float32) / 255 if unit else super().scaled(images)

    def unscaled(self, pixels: Float[ArrayLike, "*axes"]) -> Float[Array, "*axes"]:
        """See `QuantizedTokenizer.unscaled`."""
        return jnp.clip(pixels, 0.0, 1.0) if self.options.pixel_range == "unit" else super().unscaled(pixels)

    def signed(self, pixels: Float[ArrayLike, "*axes"]) -> Float[ArrayLike, "*axes"]:
        """Maps pixels in the scale of the network to that of losses: white is 1, black -1. Clips nothing."""
        return 2 * pixels - 1 if self.options.pixel_range == "unit" else pixels

    def code_logits(self, params: PyTree, features: Float[ArrayLike, "B h w D"]) -> Float[Array, "B h w V"]:
        """Computes the logits of the codes from `features`, float32 [B, h, w, V]. Only with quantizer="gumbel"."""
        return self.module.apply({"params": params}, features, method="code_logits")

    def encode(self, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]) -> Int[Array, "B h w"]:
        """Encodes images to tokens: the nearest code at each position, or the most likely one (GumbelVQ).

        Args:
          params: unboxed parameters.
          images: uint8 [B, H, W, 3].

        Returns:
          Tokens, int32 [B, h, w].
        """
        if self.options.quantizer == "gumbel":
            logits = self.code_logits(params, self.features(params, images))
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return super().encode(params, images)

    def codebook(self, params: PyTree) -> Float[ArrayLike, "V D"]:
        """Returns the codes as the decoder reads them, float32 [V, D]."""
        return self.module.apply({"params": params}, method="vectors")

    def flops(self, image_size: int) -> Flops:
        """See `ImageTokenizer.flops`."""
        return vqgan_flops(self.options, image_size)
