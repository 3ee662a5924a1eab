"""The discrete variational autoencoder (dVAE) as an image tokenizer (DALL-E, arXiv 2102.12092, section 2.1).

B batch    H, W image    h, w grid, H = downsample * h    V vocabulary    D codebook width
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from dalle_jax.image_tokenizers import logit_laplace
from dalle_jax.image_tokenizers.dvae_network import DVAE, DVAEOptions
from dalle_jax.image_tokenizers.flops import Flops, dvae_flops
from dalle_jax.image_tokenizers.network_tokenizer import NetworkTokenizer
from dalle_jax.pytree import PyTree


@dataclasses.dataclass(frozen=True)
class DVAETokenizer(NetworkTokenizer):
    """The dVAE as an `ImageTokenizer`. All methods are pure functions of the parameters.

    Attributes:
      options: sizes.
    """

    options: DVAEOptions
    kind = "dvae"
    network = DVAE

    def encode_logits(self, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B h w V"]:
        """Computes the logits of the codes.

        Args:
          params: unboxed parameters.
          images: uint8 [B, H, W, 3].

        Returns:
          float32 [B, h, w, V].

        Raises:
          ConfigError: H or W is not a multiple of `downsample`.
        """
        self.grid(images.shape[1])
        self.grid(images.shape[2])
        images = logit_laplace.map_pixels(images)
        return self.module.apply({"params": params}, images, method="encode_logits")

    def decode_maps(
        self, params: PyTree, codes: Int[ArrayLike, "B h w"] | Float[ArrayLike, "B h w V"]
    ) -> tuple[Float[Array, "B H W 3"], Float[Array, "B H W 3"]]:
        """Decodes tokens or codes to the distribution of each pixel.

        Args:
          params: unboxed parameters.
          codes: tokens, int32 [B, h, w], or relaxed one-hot codes, float32 [B, h, w, V].

        Returns:
          μ and ln b, each float32 [B, H, W, 3].
        """
        method = "decode_tokens" if jnp.issubdtype(codes.dtype, jnp.integer) else "decode_maps"
        mean, log_scale = jnp.split(self.module.apply({"params": params}, codes, method=method), 2, axis=-1)
        floor = self.options.min_log_scale
        return mean, log_scale if floor is None else jnp.maximum(log_scale, floor)

    def encode(self, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]) -> Int[Array, "B h w"]:
        """Encodes images to tokens: the most likely code at each position.

        Args:
          params: unboxed parameters.
          images: uint8 [B, H, W, 3].

        Returns:
          Tokens, int32 [B, h, w].
        """
        return jnp.argmax(self.encode_logits(params, images), axis=-1).astype(jnp.int32)

    def decode(self, params: PyTree, tokens: Int[ArrayLike, "B h w"]) -> Float[Array, "B H W 3"]:
        """Decodes tokens to images.

        Args:
          params: unboxed parameters.
          tokens: int32 [B, h, w].

        Returns:
          Images, float32 [B, H, W, 3] in [0, 1].
        """
        mean, _ = self.decode_maps(params, tokens)
        return logit_laplace.to_pixels(mean)

    def codebook(self, params: PyTree) -> Float[ArrayLike, "V D"]:
        """Returns the vector of each token at the decoder's input, float32 [V, D]."""
        return params["codebook"]["kernel"]

    def flops(self, image_size: int) -> Flops:
        """See `ImageTokenizer.flops`."""
        return dvae_flops(self.options, image_size)
