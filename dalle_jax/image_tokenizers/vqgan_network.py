"""The network of the VQGAN: encoder, codes and decoder (taming transformers, arXiv 2012.09841, section 3.1).

By default the layers are those of the authors' code. Residual blocks normalise by groups of channels (epsilon 1e-6) and
use swish. The encoder halves the resolution by convolutions of stride 2, whose input is padded by one row below and one
column to the right only. The decoder doubles it by nearest neighbours and a convolution. Attention with one head
follows the blocks of the levels in `attention_levels`, and stands between the two middle blocks of both sides.
`VQGANOptions` has the variations of MaskGIT (arXiv 2202.04200) and LlamaGen (arXiv 2406.06525).

    image → encoder → 1x1 (to_codes) → quantiser → 1x1 (from_codes) → decoder → pixels

There are two quantisers. "nearest" replaces a feature by its nearest code (VQGAN). "gumbel" computes a logit for each
code by a 1x1 convolution, and its token is the argmax (GumbelVQ). With `normalized_codes`, features and codes have
length 1, as in ViT-VQGAN (arXiv 2110.04627, section 3.2) and LlamaGen.

Convolutions of kernel 1 are dense layers: the numbers are the same, and matrix products are faster.

    B batch    H, W image or grid    h, w grid of tokens, H = downsample * h    C channels    Z latent channels
    D code width    V codes
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.distributed.sharding import constrain
from dalle_jax.image_tokenizers.resampling import average_pool, upsample
from dalle_jax.image_tokenizers.vqgan_layers import Attention, Block, Middle, convolution, dense, group_norm
from dalle_jax.image_tokenizers.vqgan_options import VQGANOptions

_SMALLEST_LENGTH = 1e-12  # of a feature before it is normalised


def normalized(vectors: Float[ArrayLike, "*axes D"]) -> Float[Array, "*axes D"]:
    """Scales vectors [..., D] to length 1."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST_LENGTH**2))


def _level(o: VQGANOptions, level: int, count: int, x: jax.Array) -> jax.Array:
    """Applies the blocks of a level, and its attention. Called inside of a compact method, which owns the modules."""
    for block in range(count):
        x = Block(o.widths[level], o, name=f"level_{level}_block_{block}")(x)
        if level in o.attention_levels:
            x = Attention(o, name=f"level_{level}_attention_{block}")(x)
    return x


class Encoder(nn.Module):
    """Computes latents from pixels.

    Attributes:
      options: options of the VQGAN.
    """

    options: VQGANOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B h w Z"]:
        """Maps pixels in the range of the options, float32 [B, H, W, 3], to float32 [B, h, w, Z]."""
        o = self.options
        x = constrain(convolution(o.hidden, o.dtype, "input", bias=o.block_bias)(x), "batch", None, None, None)
        for level, width in enumerate(o.widths):
            x = _level(o, level, o.blocks, x)
            if level < len(o.widths) - 1:
                halved = o.downsampling == "convolution"
                x = convolution(width, o.dtype, f"level_{level}_down", halve=True)(x) if halved else average_pool(x)
        x = nn.swish(group_norm(o, "norm")(Middle(o, name="middle")(x)))
        output = convolution if o.code_layers else dense
        return output(o.latent, "float32", "output")(x)


class Decoder(nn.Module):
    """Computes pixels from latents.

    Attributes:
      options: options of the VQGAN.
    """

    options: VQGANOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B h w Z"]) -> Float[Array, "B H W 3"]:
        """Maps float32 [B, h, w, Z] to pixels, float32 [B, H, W, 3], about in the range and not clipped."""
        o = self.options
        x = constrain(convolution(o.widths[-1], o.dtype, "input")(x), "batch", None, None, None)
        x = Middle(o, name="middle")(x)
        for level, width in reversed(list(enumerate(o.widths))):
            x = _level(o, level, o.blocks_up, x)
            if level:
                x = convolution(width, o.dtype, f"level_{level}_up")(upsample(x))
        return convolution(3, "float32", "output")(nn.swish(group_norm(o, "norm")(x)))


class Codes(nn.Module):
    """The codes.

    Attributes:
      options: options of the VQGAN.
    """

    options: VQGANOptions

    @nn.compact
    def __call__(self) -> Float[ArrayLike, "V D"]:
        """Returns the codes, float32 [V, D]."""
        o = self.options
        # As the authors' code: U(±1/V) for the nearest code, N(0, 1) for GumbelVQ. Normalised codes need directions.
        narrow = o.quantizer == "nearest" and not o.normalized_codes
        init = _centred_uniform(1 / o.vocab_size) if narrow else nn.initializers.normal(1.0)
        names = ("codebook", "conv_in")
        vectors = self.param("vectors", nn.with_logical_partitioning(init, names), (o.vocab_size, o.code_dim))
        return normalized(vectors) if o.normalized_codes else vectors


def _centred_uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class VQGAN(nn.Module):
    """Encoder, codes and decoder.

    Attributes:
      options: options of the VQGAN.
    """

    options: VQGANOptions

    def setup(self):
        o = self.options
        self.encoder, self.decoder, self.codes = Encoder(o), Decoder(o), Codes(o)
        if o.code_layers:
            self.to_codes, self.from_codes = dense(o.code_dim, "float32", None), dense(o.latent, "float32", None)
        if o.quantizer == "gumbel":
            self.logits = dense(o.vocab_size, "float32", None, out_axis="codebook")

    def encode(self, pixels: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Computes the features that are quantised, from pixels in the range of the options."""
        features = self.encoder(pixels)
        features = self.to_codes(features) if self.options.code_layers else features
        return normalized(features) if self.options.normalized_codes else features

    def code_logits(self, features: Float[ArrayLike, "B h w D"]) -> Float[Array, "B h w V"]:
        """Computes the logits of the codes from features. Only with quantizer="gumbel"."""
        return self.logits(features)

    def vectors(self) -> Float[ArrayLike, "V D"]:
        """Returns the codes as the decoder reads them."""
        return self.codes()

    def decode(self, vectors: Float[ArrayLike, "B h w D"]) -> Float[Array, "B H W 3"]:
        """Decodes codes to pixels, about in the range of the options and not clipped."""
        return self.decoder(self.from_codes(vectors) if self.options.code_layers else vectors)

    def __call__(self, pixels: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Reconstructs pixels without quantisation, and so creates every parameter."""
        self.codes()
        features = self.encode(pixels)
        if self.options.quantizer == "gumbel":
            self.logits(features)
        return self.decode(features)
