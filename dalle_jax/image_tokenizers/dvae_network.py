"""The network of the discrete variational autoencoder (dVAE): encoder, codebook and decoder.

DALL-E (arXiv 2102.12092), section 2.1 and appendix A, with the blocks of the published `openai/DALL-E` code. These are
residual blocks without normalisation, max pooling, nearest-neighbour upsampling, and a decoder that mirrors the
encoder. In training the decoder reads a relaxed one-hot code (Gumbel-softmax). Tokens are the argmax of the encoder's
logits.

`stem_factor` s > 1 is an addition. The encoder then starts from s x s blocks of pixels as channels, and the decoder
ends with the inverse. No convolution runs at full resolution, because convolutions of few channels on many pixels are
slow on CPUs. The small configurations train several times faster with it.

Convolutions of kernel 1 are dense layers: the numbers are the same, and matrix products are faster.

    B batch    H, W image    C channels    h, w grid, H = downsample * h    V vocabulary    D codebook width
    F features
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from dalle_jax.configuration.options import check
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.resampling import depth_to_space, max_pool, space_to_depth, token_grid, upsample
from dalle_jax.token_layout import LARGEST_VOCABULARY

_MOST = {  # no device holds more
    "image_size": 2**13,
    "vocab_size": LARGEST_VOCABULARY,
    "hidden": 2**14,
    "groups": 12,
    "blocks_per_group": 256,
    "codebook_dim": 2**16,
    "in_kernel": 255,
    "stem_factor": 2**8,
    "logit_scale": 1000,
    "codebook_scale": 1000,
}


@dataclasses.dataclass(frozen=True)
class DVAEOptions:
    """Hyper-parameters of the dVAE; the defaults are those of the paper.

    Attributes:
      image_size: side of the training images in pixels. The network is convolutional and can encode any multiple of
        `downsample`.
      vocab_size: V, the number of codes.
      hidden: width of the first group of blocks; group i is 2**i times as wide.
      groups: number of groups of blocks; the resolution halves between them.
      blocks_per_group: number of residual blocks in a group.
      codebook_dim: D, the width of a code's vector at the decoder's input.
      in_kernel: side of the encoder's first convolution.
      stem_factor: s, the side of the pixel blocks that become channels first; 1 (the paper) for none.
      logit_scale: factor on the initial output layer of the encoder; 1 in the paper.
      codebook_scale: factor on the initial codebook; 1 in the paper, which draws from N(0, 1/√V).
      min_log_scale: lower bound of ln b; None (the paper) for no bound. Drawings have flat areas, whose likelihood
        grows without limit as b shrinks. Edges, where b is large, then lose all weight in the loss.
      dtype: dtype of the activations inside the blocks. Parameters, logits and pixel distributions are float32.
    """

    image_size: int = 256
    vocab_size: int = 8192
    hidden: int = 256
    groups: int = 4
    blocks_per_group: int = 2
    codebook_dim: int = 128
    in_kernel: int = 7
    stem_factor: int = 1
    logit_scale: float = 1.0
    codebook_scale: float = 1.0
    min_log_scale: float | None = None
    dtype: str = "float32"

    def __post_init__(self):
        sizes = [field.name for field in dataclasses.fields(self) if field.name not in ("dtype", "min_log_scale")]
        choices = {"dtype": ("float32", "bfloat16")}
        check(self, "model", positive=sizes, odd=["in_kernel"], most=_MOST, choices=choices)
        if self.hidden % 4:
            raise ConfigError(
                f"config.model.hidden is {self.hidden}; expected a multiple of 4 (blocks narrow to a quarter)."
            )
        self.grid(self.image_size)

    @property
    def downsample(self) -> int:
        """Side of the square of pixels that one token stands for."""
        return self.stem_factor * 2 ** (self.groups - 1)

    @property
    def layers(self) -> int:
        """Number of residual blocks in the encoder, and in the decoder."""
        return self.groups * self.blocks_per_group

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns the number of rows and columns of tokens of a square image.

        Args:
          image_size: side of the image in pixels.

        Raises:
          ConfigError: the side is not a multiple of `downsample`.
        """
        return token_grid(image_size, self.downsample)


# -- modules ------------------------------------------------------------------------------------------------------


def convolution(
    features: int, kernel: int, dtype: str, name: str | None, *, scale: float = 1.0, out_axis: str = "conv_out"
) -> nn.Module:
    """Builds a convolution that keeps the resolution.

    Args:
      features: number of output channels.
      kernel: side of the kernel, odd.
      dtype: dtype of the computation.
      name: name of the module; None inside `setup`.
      scale: the weights start as N(0, scale/√(inputs * kernel²)), the bias as 0.
      out_axis: logical name of the output channels.
    """
    normal = nn.initializers.variance_scaling(scale**2, "fan_in", "normal")
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (out_axis,))
    if kernel == 1:
        kernel_init = nn.with_logical_partitioning(normal, ("conv_in", out_axis))
        return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)
    kernel_init = nn.with_logical_partitioning(normal, (None, None, "conv_in", out_axis))
    return nn.Conv(features, (kernel, kernel), dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name=name)


class Block(nn.Module):
    """A residual block: four convolutions, three of them with a quarter of the width, scaled by 1/layers².

    Attributes:
      features: number of output channels.
      kernels: sides of the four kernels: 3, 3, 3, 1 in the encoder, the reverse in the decoder.
      options: options of the dVAE.
    """

    features: int
    kernels: tuple[int, int, int, int]
    options: DVAEOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B H W C"]) -> Float[Array, "B H W F"]:
        """Maps [B, H, W, C] to [B, H, W, features]."""
        dtype = self.options.dtype
        skip = x if x.shape[-1] == self.features else convolution(self.features, 1, dtype, "skip")(x)
        for i, kernel in enumerate(self.kernels, start=1):
            width = self.features if i == 4 else self.features // 4
            x = convolution(width, kernel, dtype, f"conv_{i}")(nn.relu(x))
        x = skip + x / self.options.layers**2
        return constrain(x, "batch", None, None, None)


class Encoder(nn.Module):
    """Computes the logits of the codes from mapped pixels.

    Attributes:
      options: options of the dVAE.
    """

    options: DVAEOptions

    def setup(self):
        o = self.options
        self.input = convolution(o.hidden, o.in_kernel, o.dtype, None)
        self.blocks = {
            name: Block(o.hidden * 2**group, (3, 3, 3, 1), o, name=name)
            for group in range(o.groups)
            for name in (f"group_{group + 1}_block_{block + 1}" for block in range(o.blocks_per_group))
        }
        self.output = convolution(o.vocab_size, 1, "float32", None, scale=o.logit_scale, out_axis="codebook")

    def features(self, x: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B h w F"]:
        """Computes the input of the output layer: float32 [B, H, W, 3] to [B, h, w, F]."""
        o = self.options
        x = self.input(space_to_depth(x, o.stem_factor))
        # Without this constraint, XLA's partitioner computes a gradient of this layer that is wrong by 2% on a mesh of
        # 2x2x2 (tests/distributed/test_factorisations.py).
        x = constrain(x, "batch", None, None, None)
        for group in range(o.groups):
            for block in range(o.blocks_per_group):
                x = self.blocks[f"group_{group + 1}_block_{block + 1}"](x)
            if group < o.groups - 1:
                x = max_pool(x)
        return nn.relu(x)

    def __call__(self, x: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B h w V"]:
        """Computes the logits of the codes: float32 [B, H, W, 3] to float32 [B, h, w, V]."""
        return self.output(self.features(x))


class Codebook(nn.Module):
    """One vector per code, applied to relaxed codes as a product and to tokens as a look-up.

    Attributes:
      options: options of the dVAE.
    """

    options: DVAEOptions

    def setup(self):
        o = self.options
        normal = nn.initializers.normal(o.codebook_scale / o.vocab_size**0.5)
        names = ("codebook", "conv_in")
        self.kernel = self.param("kernel", nn.with_logical_partitioning(normal, names), (o.vocab_size, o.codebook_dim))
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("conv_in",))
        self.bias = self.param("bias", zeros, (o.codebook_dim,))

    def __call__(self, codes: Float[ArrayLike, "B h w V"]) -> Float[ArrayLike, "B h w D"]:
        """Embeds relaxed codes of sum 1, float32 [B, h, w, V], as [B, h, w, D]."""
        return codes @ self.kernel + self.bias[None, None, None]

    def lookup(self, tokens: Int[ArrayLike, "B h w"]) -> Float[Array, "B h w D"]:
        """Embeds tokens, int32 [B, h, w], as [B, h, w, D]."""
        return jnp.take(self.kernel, tokens, axis=0) + self.bias[None, None, None]


class Decoder(nn.Module):
    """Computes the distribution of each pixel from the vectors of the codes.

    Attributes:
      options: options of the dVAE.
    """

    options: DVAEOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B h w D"]) -> Float[Array, "B H W 6"]:
        """Maps [B, h, w, D] to float32 [B, H, W, 6]: μ of red, green and blue, then ln b of each."""
        o = self.options
        x = x.astype(o.dtype)
        for group in range(o.groups):
            for block in range(o.blocks_per_group):
                features = o.hidden * 2 ** (o.groups - 1 - group)
                x = Block(features, (1, 3, 3, 3), o, name=f"group_{group + 1}_block_{block + 1}")(x)
            if group < o.groups - 1:
                x = upsample(x)
        x = convolution(6 * o.stem_factor**2, 1, o.dtype, "output")(nn.relu(x))
        return depth_to_space(x.astype(jnp.float32), o.stem_factor)


class DVAE(nn.Module):
    """Encoder, codebook and decoder.

    Attributes:
      options: options of the dVAE.
    """

    options: DVAEOptions

    def setup(self):
        self.encoder, self.codebook, self.decoder = Encoder(self.options), Codebook(self.options), Decoder(self.options)

    def encode_logits(self, images: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B h w V"]:
        """Computes logits, float32 [B, h, w, V], from images of `map_pixels`, float32 [B, H, W, 3]."""
        return self.encoder(images)

    def encode_features(self, images: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B h w F"]:
        """Computes the input of the encoder's output layer, [B, h, w, F], from images of `map_pixels`."""
        return self.encoder.features(images)

    def decode_maps(self, codes: Float[ArrayLike, "B h w V"]) -> Float[Array, "B H W 6"]:
        """Decodes one-hot or relaxed codes, float32 [B, h, w, V], to μ and ln b, float32 [B, H, W, 6]."""
        return self.decoder(self.codebook(codes))

    def decode_tokens(self, tokens: Int[ArrayLike, "B h w"]) -> Float[Array, "B H W 6"]:
        """Decodes tokens, int32 [B, h, w], to μ and ln b, float32 [B, H, W, 6]."""
        return self.decoder(self.codebook.lookup(tokens))

    def __call__(self, images: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B H W 6"]:
        """Reconstructs images of `map_pixels` through softmax codes, and so creates every parameter."""
        return self.decode_maps(jax.nn.softmax(self.encode_logits(images)))
