"""The part that image tokenizers with a nearest code have in common: from pixels to tokens and back.

B batch    H, W image    h, w grid, H = downsample * h    V codes    D code width
"""

from __future__ import annotations

import abc
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from dalle_jax.image_tokenizers.network_tokenizer import NetworkTokenizer
from dalle_jax.image_tokenizers.signed_pixels import from_signed, to_signed
from dalle_jax.image_tokenizers.vector_quantizer import nearest
from dalle_jax.pytree import PyTree


@dataclasses.dataclass(frozen=True)
class QuantizedTokenizer(NetworkTokenizer, abc.ABC):
    """Base of a tokenizer whose network has the methods `encode` (pixels to features) and `decode` (codes to pixels).

    All methods are pure functions of the parameters.
    """

    def features(self, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Computes the features that are quantised.

        Args:
          params: unboxed parameters.
          images: uint8 [B, H, W, 3].

        Returns:
          float32 [B, h, w, D].

        Raises:
          ConfigError: H or W is not a multiple of `downsample`.
        """
        self.grid(images.shape[1])
        self.grid(images.shape[2])
        return self.module.apply({"params": params}, self.scaled(images), method="encode")

    def scaled(self, images: UInt8[ArrayLike, "*axes"]) -> Float[ArrayLike, "*axes"]:
        """Maps uint8 pixels to the scale of the network, float32 in [-1, 1]."""
        return to_signed(images)

    def unscaled(self, pixels: Float[ArrayLike, "*axes"]) -> Float[Array, "*axes"]:
        """Maps pixels in the scale of the network to [0, 1], and clips them."""
        return from_signed(pixels)

    def decode_vectors(self, params: PyTree, vectors: Float[ArrayLike, "B h w D"]) -> Float[Array, "B H W 3"]:
        """Decodes codes, float32 [B, h, w, D], to unclipped pixels in the network's scale, float32 [B, H, W, 3]."""
        return self.module.apply({"params": params}, vectors, method="decode")

    def encode(self, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]) -> Int[Array, "B h w"]:
        """Encodes images to tokens: the nearest code at each position.

        Args:
          params: unboxed parameters.
          images: uint8 [B, H, W, 3].

        Returns:
          Tokens, int32 [B, h, w].
        """
        features = self.features(params, images)
        tokens = nearest(features.reshape(-1, features.shape[-1]), self.codebook(params))
        return tokens.reshape(features.shape[:-1])

    def decode(self, params: PyTree, tokens: Int[ArrayLike, "B h w"]) -> Float[Array, "B H W 3"]:
        """Decodes tokens to images.

        Args:
          params: unboxed parameters.
          tokens: int32 [B, h, w].

        Returns:
          Images, float32 [B, H, W, 3] in [0, 1].
        """
        return self.unscaled(self.decode_vectors(params, jnp.take(self.codebook(params), tokens, axis=0)))

    @abc.abstractmethod
    def codebook(self, params: PyTree) -> Float[ArrayLike, "V D"]:
        """Returns the codes as the decoder reads them, float32 [V, D]."""
