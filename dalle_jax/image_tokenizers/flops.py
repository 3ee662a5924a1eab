"""Counts the floating-point operations of image tokenizers from their sizes. A multiplication counts as two.

V vocabulary    D codebook width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dalle_jax.image_tokenizers.dvae_network import DVAEOptions
from dalle_jax.image_tokenizers.vq_network import VQOptions
from dalle_jax.image_tokenizers.vqgan_options import VQGANOptions


class Flops(NamedTuple):
    """Operations of a tokenizer for one image.

    Attributes:
      encoder: forward pass of the encoder, up to features or logits.
      search: distances of the features to all codes, which have no gradient. 0 for a tokenizer without them.
      decoder: forward pass of the decoder in training, where codes may be relaxed.
      first_layer: the layers that read the image, a part of `encoder`. The image needs no gradient.
    """

    encoder: float
    search: float
    decoder: float
    first_layer: float

    @property
    def encoding(self) -> float:
        """Operations from an image to its tokens."""
        return self.encoder + self.search

    @property
    def training(self) -> float:
        """Operations of a forward and a backward pass."""
        return 3 * (self.encoder + self.decoder) + self.search - self.first_layer


# -- the dVAE -----------------------------------------------------------------------------------------------------


def dvae_flops(options: DVAEOptions, image_size: int) -> Flops:
    """Counts the dVAE.

    Args:
      options: its sizes.
      image_size: side of the image in pixels.
    """
    o = dataclasses.replace(options, image_size=image_size)
    sides = [image_size // o.stem_factor // 2**group for group in range(o.groups)]
    widths = [o.hidden * 2**group for group in range(o.groups)]
    first_layer = 2 * sides[0] ** 2 * o.in_kernel**2 * 3 * o.stem_factor**2 * o.hidden
    logits = 2 * sides[-1] ** 2 * widths[-1] * o.vocab_size
    codebook = 2 * sides[-1] ** 2 * o.vocab_size * o.codebook_dim
    maps = 2 * sides[0] ** 2 * o.hidden * 6 * o.stem_factor**2
    up = _dvae_blocks(o, widths[::-1], sides[::-1], o.codebook_dim, (1, 3, 3, 3))
    return Flops(
        encoder=first_layer + _dvae_blocks(o, widths, sides, o.hidden, (3, 3, 3, 1)) + logits,
        search=0.0,
        decoder=codebook + up + maps,
        first_layer=first_layer,
    )


def _dvae_block(side: int, inputs: int, outputs: int, kernels: tuple[int, ...]) -> float:
    widths = (inputs, *[outputs // 4] * 3, outputs)
    residual = sum(k * k * a * b for k, a, b in zip(kernels, widths, widths[1:]))
    return 2 * side**2 * (residual + (inputs * outputs if inputs != outputs else 0))


def _dvae_blocks(
    o: DVAEOptions, widths: Sequence[int], sides: Sequence[int], before: int, kernels: tuple[int, ...]
) -> float:
    total = 0.0
    for width, side in zip(widths, sides):
        for _ in range(o.blocks_per_group):
            total += _dvae_block(side, before, width, kernels)
            before = width
    return total


# -- the small vector-quantised tokenizer -------------------------------------------------------------------------


def vq_flops(options: VQOptions, image_size: int) -> Flops:
    """Counts the small vector-quantised tokenizer; see `dvae_flops`."""
    o = options
    tokens = (image_size // o.downsample) ** 2
    return Flops(
        encoder=_vq_path(o, tokens, o.subpixels, o.code_dim, o.encoder_blocks),
        search=2 * tokens * o.code_dim * o.vocab_size,
        decoder=_vq_path(o, tokens, o.code_dim, o.subpixels, o.decoder_blocks),
        first_layer=2 * tokens * o.subpixels * (9 * o.hidden + o.code_dim),
    )


def _vq_path(o: VQOptions, tokens: int, inputs: int, outputs: int, blocks: int) -> float:
    return 2 * tokens * (inputs * (outputs + 9 * o.hidden) + blocks * 18 * o.hidden**2 + o.hidden * outputs)


# -- the VQGAN ----------------------------------------------------------------------------------------------------


def vqgan_flops(options: VQGANOptions, image_size: int) -> Flops:
    """Counts the VQGAN without a discriminator; see `dvae_flops`."""
    o = options
    widths, levels = o.widths, len(o.widths)
    sides = [image_size // 2**level for level in range(levels)]
    tokens, last = sides[-1] ** 2, widths[-1]
    first_layer = 2 * sides[0] ** 2 * 27 * o.hidden
    middle = 2 * _vqgan_block(o, sides[-1], last, last)
    middle += _vqgan_attention(sides[-1], last) if o.middle_attention else 0.0
    all_codes = 2 * tokens * o.code_dim * o.vocab_size
    relaxed = all_codes if o.quantizer == "gumbel" else 0.0

    through_codes = 2 * tokens * o.latent * o.code_dim if o.code_layers else 0.0
    out_kernel = 9 if o.code_layers else 1

    encoder = first_layer + middle + 2 * tokens * o.latent * out_kernel * last + through_codes + relaxed
    before = o.hidden
    for level in range(levels):
        encoder += _vqgan_level(o, level, sides[level], before, o.blocks)
        before = widths[level]
        if level < levels - 1 and o.downsampling == "convolution":
            encoder += 2 * sides[level + 1] ** 2 * 9 * before**2

    decoder = relaxed + through_codes + 2 * tokens * o.latent * 9 * last + middle
    before = last
    for level in reversed(range(levels)):
        decoder += _vqgan_level(o, level, sides[level], before, o.blocks_up)
        before = widths[level]
        if level:
            decoder += 2 * sides[level - 1] ** 2 * 9 * before**2
    decoder += 2 * sides[0] ** 2 * 27 * before
    return Flops(encoder, 0.0 if relaxed else all_codes, decoder, first_layer)


def _vqgan_level(o: VQGANOptions, level: int, side: int, before: int, blocks: int) -> float:
    width = o.widths[level]
    attention = blocks * _vqgan_attention(side, width) if level in o.attention_levels else 0.0
    return _vqgan_block(o, side, before, width) + (blocks - 1) * _vqgan_block(o, side, width, width) + attention


def _vqgan_block(o: VQGANOptions, side: int, inputs: int, outputs: int) -> float:
    skip = (inputs if o.skip == "input" else outputs) * outputs if inputs != outputs else 0
    return 2 * side**2 * (9 * outputs * (inputs + outputs) + skip)


def _vqgan_attention(side: int, width: int) -> float:
    return 8 * side**2 * width**2 + 4 * side**4 * width
