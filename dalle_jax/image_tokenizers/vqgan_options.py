"""Hyper-parameters of the VQGAN (`vqgan_network.py`).

The defaults describe the published VQGAN of taming transformers. The other values describe later tokenizers of the same
family. MaskGIT's has `downsampling="average"`, `block_bias=False`, `skip="branch"`, `pixel_range="unit"`, neither
attention nor code layers, and as many blocks in the decoder as in the encoder. LlamaGen's has `normalized_codes`.
"""

from __future__ import annotations

import dataclasses

from dalle_jax.configuration.options import check
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.resampling import token_grid
from dalle_jax.token_layout import LARGEST_VOCABULARY

QUANTIZERS = ("nearest", "gumbel")
DOWNSAMPLINGS = ("convolution", "average")
SKIPS = ("input", "branch")
PIXEL_RANGES = ("signed", "unit")
_MOST = {  # no device holds more
    "image_size": 2**13,
    "vocab_size": LARGEST_VOCABULARY,
    "code_dim": 2**16,
    "latent": 2**16,
    "hidden": 2**14,
    "blocks": 256,
    "decoder_blocks": 256,
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
      blocks: number of residual blocks of a level of the encoder.
      attention_levels: levels, counted from 0, whose blocks are followed by attention. Level i works on a grid of
        image_size / 2**i positions a side. The paper has attention at 16 x 16: level 4 of images of 256 pixels.
      norm_groups: groups of channels that are normalised together. It divides the channels of every level.
      quantizer: "nearest" or "gumbel".
      normalized_codes: whether features and codes are scaled to length 1. Only with quantizer="nearest".
      downsampling: how the encoder halves the resolution. "convolution" of stride 2, or "average" of 2 x 2 positions.
      block_bias: whether the convolutions of residual blocks and the first one of the encoder have biases.
      skip: what a residual block adds when its number of channels changes. "input": a 1x1 convolution of its input.
        "branch": a 1x1 convolution of the branch.
      middle_attention: whether attention stands between the two middle blocks.
      decoder_blocks: number of residual blocks of a level of the decoder; None for one more than `blocks`.
      code_layers: whether 1x1 convolutions stand between encoder, codes and decoder. Without them the encoder ends in a
        1x1 convolution to the code width, the decoder reads the codes, and `latent` must be `code_dim`.
      pixel_range: "signed": the network reads and returns pixels in [-1, 1]. "unit": in [0, 1].
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
    downsampling: str = "convolution"
    block_bias: bool = True
    skip: str = "input"
    middle_attention: bool = True
    decoder_blocks: int | None = None
    code_layers: bool = True
    pixel_range: str = "signed"
    dtype: str = "float32"

    def __post_init__(self):
        choices = {
            "dtype": ("float32", "bfloat16"), "quantizer": QUANTIZERS, "downsampling": DOWNSAMPLINGS, "skip": SKIPS,
            "pixel_range": PIXEL_RANGES,
        }  # fmt: skip
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
        if not self.code_layers and self.latent != self.code_dim:
            raise ConfigError(
                f"config.model.latent is {self.latent} and config.model.code_dim {self.code_dim}, but without "
                "config.model.code_layers the encoder's output is what is quantised. Set "
                f"--config.model.latent={self.code_dim}."
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

    @property
    def blocks_up(self) -> int:
        """Number of residual blocks of a level of the decoder."""
        return self.blocks + 1 if self.decoder_blocks is None else self.decoder_blocks

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns the number of rows and columns of tokens of a square image.

        Args:
          image_size: side of the image in pixels.

        Raises:
          ConfigError: the side is not a multiple of `downsample`.
        """
        return token_grid(image_size, self.downsample)
