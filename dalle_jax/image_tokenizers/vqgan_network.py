"""The network of the VQGAN: encoder, codes and decoder (taming transformers, arXiv 2012.09841, section 3.1).

The layers are those of the authors' code. Residual blocks normalise by groups of channels (epsilon 1e-6) and use swish.
The encoder halves the resolution by convolutions of stride 2, whose input is padded by one row below and one column to
the right only. The decoder doubles it by nearest neighbours and a convolution. Attention with one head follows the
blocks of the levels in `attention_levels`, and stands between the two middle blocks of both sides.

    image → encoder → 1x1 (to_codes) → quantiser → 1x1 (from_codes) → decoder → pixels

There are two quantisers. "nearest" replaces a feature by its nearest code (VQGAN). "gumbel" computes a logit for each
code by a 1x1 convolution, and its token is the argmax (GumbelVQ). With `normalized_codes`, features and codes have
length 1, as in ViT-VQGAN (arXiv 2110.04627, section 3.2) and LlamaGen.

Convolutions of kernel 1 are dense layers: the numbers are the same, and matrix products are faster.

    B batch    H, W image or grid    h, w grid of tokens, H = downsample * h    C channels    Z latent channels
    D code width    V codes
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.configuration.options import check
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.resampling import token_grid, upsample
from dalle_jax.token_layout import LARGEST_VOCABULARY

QUANTIZERS = ("nearest", "gumbel")
_EPSILON = 1e-6  # of the normalisation
_SMALLEST_LENGTH = 1e-12  # of a feature before it is normalised
_SAME, _BELOW_AND_RIGHT = ((1, 1), (1, 1)), ((0, 1), (0, 1))  # padding of kernels of 3
_MOST = {  # no device holds more
    "image_size": 2**13,
    "vocab_size": LARGEST_VOCABULARY,
    "code_dim": 2**16,
    "latent": 2**16,
    "hidden": 2**14,
    "blocks": 256,
    "norm_groups": 2**14,
}
_MOST_LEVELS, _LARGEST_MULTIPLIER = 12, 2**8


@dataclasses.dataclass(frozen=True)
class VQGANOptions:
    """Hyper-parameters of the VQGAN. The defaults are those of the published model with f = 16 and 1,024 codes.

    Attributes:
      image_size: side of the training images in pixels. The network is convolutional and can encode any multiple of
        `downsample`.
      vocab_size: V, the number of codes.
      code_dim: D, the width of a code.
      latent: Z, the number of channels between the encoder, the two 1x1 convolutions and the decoder.
      hidden: number of channels of the first level.
      multipliers: the channels of each level, in units of `hidden`. The resolution halves between levels, so that
        `downsample` is 2 ** (levels - 1).
      blocks: number of residual blocks of a level of the encoder. The decoder has one more.
      attention_levels: levels, counted from 0, whose blocks are followed by attention. Level i works on a grid of
        image_size / 2**i positions a side. The paper has attention at 16 x 16: level 4 of images of 256 pixels.
      norm_groups: groups of channels that are normalised together. It divides the channels of every level.
      quantizer: "nearest" or "gumbel".
      normalized_codes: whether features and codes are scaled to length 1. Only with quantizer="nearest".
      dtype: dtype of the blocks. Parameters, normalisation, features, logits, codes and pixels are float32.
    """

    image_size: int = 256
    vocab_size: int = 1024
    code_dim: int = 256
    latent: int = 256
    hidden: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (4,)
    norm_groups: int = 32
    quantizer: str = "nearest"
    normalized_codes: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        choices = {"dtype": ("float32", "bfloat16"), "quantizer": QUANTIZERS}
        check(self, "model", positive=list(_MOST), most=_MOST, choices=choices)
        levels = len(self.multipliers)
        if not 1 <= levels <= _MOST_LEVELS or not all(1 <= m <= _LARGEST_MULTIPLIER for m in self.multipliers):
            raise ConfigError(
                f"config.model.multipliers is {self.multipliers}; expected 1 to {_MOST_LEVELS} whole numbers from 1 to "
                f"{_LARGEST_MULTIPLIER}."
            )
        if sorted(set(self.attention_levels)) != list(self.attention_levels) or not all(
            0 <= level < levels for level in self.attention_levels
        ):
            raise ConfigError(
                f"config.model.attention_levels is {self.attention_levels}; expected different levels from 0 to "
                f"{levels - 1} in ascending order, because config.model.multipliers has {levels} levels."
            )
        if odd := [m for m in self.multipliers if m * self.hidden % self.norm_groups]:
            raise ConfigError(
                f"config.model.norm_groups is {self.norm_groups}, and a level has {odd[0] * self.hidden} channels "
                "(hidden times its multiplier): expected a number of groups that divides the channels."
            )
        if self.normalized_codes and self.quantizer != "nearest":
            raise ConfigError(
                f"config.model.normalized_codes is True, and config.model.quantizer is {self.quantizer!r}: lengths "
                "matter to the nearest code only. Set config.model.normalized_codes=False."
            )
        self.grid(self.image_size)

    @property
    def downsample(self) -> int:
        """Side of the square of pixels that one token stands for."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels of each level."""
        return tuple(multiplier * self.hidden for multiplier in self.multipliers)

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns the number of rows and columns of tokens of a square image.

        Args:
          image_size: side of the image in pixels.

        Raises:
          ConfigError: the side is not a multiple of `downsample`.
        """
        return token_grid(image_size, self.downsample)


def normalized(vectors: Float[ArrayLike, "*axes D"]) -> Float[Array, "*axes D"]:
    """Scales vectors [..., D] to length 1."""
    squares = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST_LENGTH**2))


# -- layers -------------------------------------------------------------------------------------------------------


def _dense(features: int, dtype: str, name: str | None, out_axis: str = "conv_out") -> nn.Module:
    """Builds a convolution of kernel 1. Weights start as U(±1/√inputs), as PyTorch's do, and the bias as 0."""
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    kernel_init = nn.with_logical_partitioning(uniform, ("conv_in", out_axis))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (out_axis,))
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


def _convolution(features: int, dtype: str, name: str | None, *, halve: bool = False) -> nn.Module:
    """Builds a convolution of kernel 3 that keeps or halves the resolution. Starts like `_dense`."""
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    kernel_init = nn.with_logical_partitioning(uniform, (None, None, "conv_in", "conv_out"))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
    strides, padding = (2, _BELOW_AND_RIGHT) if halve else (1, _SAME)
    return nn.Conv(
        features, (3, 3), strides, padding, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name
    )


def _norm(o: VQGANOptions, name: str | None) -> nn.Module:
    """Builds a normalisation over groups of channels, computed in float32."""
    scale_init = nn.with_logical_partitioning(nn.initializers.ones, ("conv_out",))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",))
    return nn.GroupNorm(
        o.norm_groups, epsilon=_EPSILON, dtype=jnp.float32, scale_init=scale_init, bias_init=bias_init,
        use_fast_variance=False, name=name,
    )  # fmt: skip


class Block(nn.Module):
    """A residual block: x + convolution(swish(norm(convolution(swish(norm(x)))))).

    Attributes:
      features: number of output channels.
      options: options of the VQGAN.
    """

    features: int
    options: VQGANOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W {self.features}"]:
        o = self.options
        y = _convolution(self.features, o.dtype, "conv_1")(nn.swish(_norm(o, "norm_1")(x)))
        y = _convolution(self.features, o.dtype, "conv_2")(nn.swish(_norm(o, "norm_2")(y)))
        skip = x if x.shape[-1] == self.features else _dense(self.features, o.dtype, "skip")(x)
        return constrain(skip + y, "batch", None, None, None)


class Attention(nn.Module):
    """Attention of every position to all positions, with one head as wide as the level.

    Attributes:
      options: options of the VQGAN.
    """

    options: VQGANOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W C"]:
        o, width = self.options, x.shape[-1]
        y = _norm(o, "norm")(x)
        query, key, value = (_dense(width, o.dtype, name)(y) for name in ("query", "key", "value"))
        logits = jnp.einsum("bijc,bklc->bijkl", query, key, preferred_element_type=jnp.float32) * width**-0.5
        shares = nn.softmax(logits, axis=(-2, -1)).astype(value.dtype)
        y = jnp.einsum("bijkl,bklc->bijc", shares, value)
        return constrain(x + _dense(width, o.dtype, "out")(y), "batch", None, None, None)


class Middle(nn.Module):
    """Two residual blocks with attention between them.

    Attributes:
      options: options of the VQGAN.
    """

    options: VQGANOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B h w C"]) -> Float[Array, "B h w C"]:
        o, width = self.options, x.shape[-1]
        x = Attention(o, name="attention")(Block(width, o, name="block_1")(x))
        return Block(width, o, name="block_2")(x)


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
        """Maps pixels in [-1, 1], float32 [B, H, W, 3], to float32 [B, h, w, Z]."""
        o = self.options
        x = constrain(_convolution(o.hidden, o.dtype, "input")(x), "batch", None, None, None)
        for level, width in enumerate(o.widths):
            x = _level(o, level, o.blocks, x)
            if level < len(o.widths) - 1:
                x = _convolution(width, o.dtype, f"level_{level}_down", halve=True)(x)
        x = Middle(o, name="middle")(x)
        return _convolution(o.latent, "float32", "output")(nn.swish(_norm(o, "norm")(x)))


class Decoder(nn.Module):
    """Computes pixels from latents.

    Attributes:
      options: options of the VQGAN.
    """

    options: VQGANOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B h w Z"]) -> Float[Array, "B H W 3"]:
        """Maps float32 [B, h, w, Z] to pixels, float32 [B, H, W, 3], about [-1, 1] and not clipped."""
        o = self.options
        x = constrain(_convolution(o.widths[-1], o.dtype, "input")(x), "batch", None, None, None)
        x = Middle(o, name="middle")(x)
        for level, width in reversed(list(enumerate(o.widths))):
            x = _level(o, level, o.blocks + 1, x)
            if level:
                x = _convolution(width, o.dtype, f"level_{level}_up")(upsample(x))
        return _convolution(3, "float32", "output")(nn.swish(_norm(o, "norm")(x)))


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
        self.to_codes, self.from_codes = _dense(o.code_dim, "float32", None), _dense(o.latent, "float32", None)
        if o.quantizer == "gumbel":
            self.logits = _dense(o.vocab_size, "float32", None, out_axis="codebook")

    def encode(self, pixels: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Computes the features that are quantised, from pixels in [-1, 1]."""
        features = self.to_codes(self.encoder(pixels))
        return normalized(features) if self.options.normalized_codes else features

    def code_logits(self, features: Float[ArrayLike, "B h w D"]) -> Float[Array, "B h w V"]:
        """Computes the logits of the codes from features. Only with quantizer="gumbel"."""
        return self.logits(features)

    def vectors(self) -> Float[ArrayLike, "V D"]:
        """Returns the codes as the decoder reads them."""
        return self.codes()

    def decode(self, vectors: Float[ArrayLike, "B h w D"]) -> Float[Array, "B H W 3"]:
        """Decodes codes to pixels, about [-1, 1] and not clipped."""
        return self.decoder(self.from_codes(vectors))

    def __call__(self, pixels: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Reconstructs pixels without quantisation, and so creates every parameter."""
        self.codes()
        features = self.encode(pixels)
        if self.options.quantizer == "gumbel":
            self.logits(features)
        return self.decode(features)
