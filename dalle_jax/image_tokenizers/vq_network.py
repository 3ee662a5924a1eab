"""The network of the small vector-quantised image tokenizer: encoder, codes and decoder on blocks of pixels.

It is not the paper's. It is made for a few thousand updates on a CPU:

    image → blocks of pixels → linear + convolutions → nearest code → linear + convolutions → blocks of pixels

Every layer works on the grid of tokens, because convolutions at full resolution are slow on CPUs. The convolutions add
to a linear path on both sides and start as zero. At the start the model therefore is a linear projection of each block,
whose codes can be clusters (`vq_start.py`). Training then learns from neighbouring blocks.

    B batch    H, W image    h, w grid    C channels    P subpixels of a block    D code width    V codes
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.configuration.options import check
from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.dvae_network import convolution
from dalle_jax.image_tokenizers.resampling import depth_to_space, space_to_depth, token_grid
from dalle_jax.token_layout import LARGEST_VOCABULARY

# Scale of layers that start as zero: at this size they add nothing that float32 would keep.
_TINY = 1e-6
_MOST = {  # no device holds more
    "image_size": 2**13,
    "tokens_per_side": 2**8,
    "vocab_size": LARGEST_VOCABULARY,
    "hidden": 2**16,
    "encoder_blocks": 256,
    "decoder_blocks": 256,
}


@dataclasses.dataclass(frozen=True)
class VQOptions:
    """Hyper-parameters of the vector-quantised image tokenizer.

    Attributes:
      image_size: side of the training images in pixels.
      tokens_per_side: side of the grid of tokens of such an image. A token stands for a block of image_size /
        tokens_per_side pixels, so that the number of tokens does not grow with the image.
      vocab_size: V, the number of codes.
      code_dim: D, the width of a code, at most the number of subpixels of a block.
      hidden: number of channels of the convolutions.
      encoder_blocks, decoder_blocks: number of residual blocks of two 3 x 3 convolutions.
      dtype: dtype of the convolutions. Parameters, features, codes and pixels are float32.
    """

    image_size: int = 32
    tokens_per_side: int = 8
    vocab_size: int = 2048
    code_dim: int = 48
    hidden: int = 128
    encoder_blocks: int = 2
    decoder_blocks: int = 2
    dtype: str = "float32"

    def __post_init__(self):
        blocks = ["encoder_blocks", "decoder_blocks"]
        sizes = [f.name for f in dataclasses.fields(self) if f.name not in ("dtype", *blocks)]
        choices = {"dtype": ("float32", "bfloat16")}
        check(self, "model", positive=sizes, at_least_0=blocks, most=_MOST, choices=choices)
        if self.image_size % self.tokens_per_side:
            raise ConfigError(
                f"config.model.tokens_per_side is {self.tokens_per_side}, and the images have {self.image_size} "
                "pixels: expected a number of tokens that divides the pixels. Set config.model.tokens_per_side or "
                "config.data.image_size."
            )
        if self.code_dim > self.subpixels:
            raise ConfigError(
                f"config.model.code_dim is {self.code_dim}; expected at most {self.subpixels}, the subpixels of a "
                f"block of {self.downsample} x {self.downsample} pixels."
            )

    @property
    def downsample(self) -> int:
        """Side of the square of pixels that one token stands for."""
        return self.image_size // self.tokens_per_side

    @property
    def subpixels(self) -> int:
        """P, the number of values of a block of pixels."""
        return 3 * self.downsample**2

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns the number of rows and columns of tokens of a square image.

        Args:
          image_size: side of the image in pixels.

        Raises:
          ConfigError: the side is not a multiple of `downsample`.
        """
        return token_grid(image_size, self.downsample)


class ResidualBlock(nn.Module):
    """x + convolution(relu(convolution(relu(x)))). The second convolution starts as zero.

    Attributes:
      options: options of the tokenizer.
    """

    options: VQOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B h w C"]) -> Float[Array, "B h w C"]:
        o = self.options
        y = convolution(o.hidden, 3, o.dtype, "conv_1")(nn.relu(x))
        y = convolution(o.hidden, 3, o.dtype, "conv_2", scale=_TINY)(nn.relu(y))
        return constrain(x + y, "batch", None, None, None)


class Path(nn.Module):
    """A linear map of each grid position plus convolutions, which start as zero.

    Attributes:
      features: number of output channels.
      blocks: number of residual blocks.
      options: options of the tokenizer.
    """

    features: int
    blocks: int
    options: VQOptions

    @nn.compact
    def __call__(self, x: Float[ArrayLike, "B h w C"]) -> Float[Array, "B h w {self.features}"]:
        o = self.options
        linear = convolution(self.features, 1, "float32", "linear")(x)
        y = convolution(o.hidden, 3, o.dtype, "input")(x)
        y = constrain(y, "batch", None, None, None)
        for block in range(self.blocks):
            y = ResidualBlock(o, name=f"block_{block + 1}")(y)
        y = convolution(self.features, 1, "float32", "output", scale=_TINY)(nn.relu(y))
        return linear + y


class Codes(nn.Module):
    """The codes with the running averages that renew them (`vector_quantizer.renew`).

    Attributes:
      options: options of the tokenizer.
    """

    options: VQOptions

    @nn.compact
    def __call__(self) -> Float[Array, "V D"]:
        o = self.options
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        normal = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("codebook", "conv_in"))
        self.param("uses", nn.with_logical_partitioning(ones, ("codebook",)), (o.vocab_size,))
        self.param("errors", nn.with_logical_partitioning(zeros, ("codebook",)), (o.vocab_size,))
        return self.param("vectors", normal, (o.vocab_size, o.code_dim))


class VQ(nn.Module):
    """Encoder, codes and decoder.

    Attributes:
      options: options of the tokenizer.
    """

    options: VQOptions

    def setup(self):
        o = self.options
        self.encoder = Path(o.code_dim, o.encoder_blocks, o)
        self.decoder = Path(o.subpixels, o.decoder_blocks, o)
        self.codes = Codes(o)

    def encode(self, pixels: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B h w D"]:
        """Computes the features of pixels in [-1, 1]: float32 [B, H, W, 3] to float32 [B, h, w, D]."""
        return self.encoder(space_to_depth(pixels, self.options.downsample))

    def decode(self, vectors: Float[ArrayLike, "B h w D"]) -> Float[Array, "B H W 3"]:
        """Decodes codes to pixels, about [-1, 1]: float32 [B, h, w, D] to float32 [B, H, W, 3]."""
        return depth_to_space(self.decoder(vectors), self.options.downsample)

    def __call__(self, pixels: Float[ArrayLike, "B H W 3"]) -> Float[Array, "B H W 3"]:
        """Reconstructs pixels without quantisation, and so creates every parameter."""
        self.codes()
        return self.decode(self.encode(pixels))
