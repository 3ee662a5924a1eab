"""MaskGIT's image tokenizer (arXiv 2202.04200, section 3.1), a VQGAN without attention, as `VQGANTokenizer`.

Layout of the original, a Flax checkpoint with kernels [height, width, in, out]. The layers of a side have consecutive
numbers in the order of computation:

    encoder/Conv_0, encoder/ResBlock_0/{GroupNorm_0,Conv_0,GroupNorm_1,Conv_1,Conv_2}, …, encoder/GroupNorm_0,
    encoder/Conv_1
    quantizer/codebook
    decoder/Conv_0, decoder/ResBlock_0/…, decoder/Conv_1 (the first upsampling), …, decoder/GroupNorm_0, decoder/Conv_5
"""

from __future__ import annotations

import re

from dalle_jax.errors import PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANOptions
from dalle_jax.pretrained import vqgan_layout
from dalle_jax.pretrained.vqgan_layout import Layout, StateDict
from dalle_jax.pytree import PyTree

_BLOCKS = _MIDDLE_BLOCKS = 2  # the original has as many in the middle as in a level
_IN_BLOCK = {"norm_1": "GroupNorm_0", "conv_1": "Conv_0", "norm_2": "GroupNorm_1", "conv_2": "Conv_1", "skip": "Conv_2"}


def options(image_size: int = 256, **sizes) -> VQGANOptions:
    """Returns the options of the published tokenizer, or of one with other sizes (fields of `VQGANOptions`)."""
    fields = {"vocab_size": 1024, "code_dim": 256, "blocks": _BLOCKS, **sizes}
    return VQGANOptions(
        image_size=image_size,
        latent=fields["code_dim"],
        decoder_blocks=fields["blocks"],
        attention_levels=(),
        middle_attention=False,
        downsampling="average",
        block_bias=False,
        skip="branch",
        code_layers=False,
        pixel_range="unit",
        **fields,
    )


def original_name(path: tuple[str, ...], o: VQGANOptions) -> str:
    """Returns the name of an array in the original by its path in our tree."""
    if path[0] == "codes":
        return "quantizer/codebook"
    side, part, *inner, leaf = path
    levels = len(o.multipliers)
    if part in ("input", "norm", "output"):
        last = 1 if side == "encoder" else levels
        return f"{side}/{ {'input': 'Conv_0', 'norm': 'GroupNorm_0', 'output': f'Conv_{last}'}[part] }/{leaf}"
    if found := re.fullmatch(r"level_(\d+)_up", part):
        return f"{side}/Conv_{levels - int(found[1])}/{leaf}"
    if part == "middle":
        number = int(inner[0].removeprefix("block_")) - 1 + (levels * o.blocks if side == "encoder" else 0)
    else:
        level, block = map(int, re.fullmatch(r"level_(\d+)_block_(\d+)", part).groups())
        before = level * o.blocks if side == "encoder" else _MIDDLE_BLOCKS + (levels - 1 - level) * o.blocks_up
        number = before + block
    return f"{side}/ResBlock_{number}/{_IN_BLOCK[inner[-1]]}/{leaf}"


def layout(o: VQGANOptions) -> Layout:
    """Returns the path in our tree and the original shape of each array, by its original name."""
    return vqgan_layout.flax_layout(o, original_name)


def options_of(arrays: StateDict) -> VQGANOptions:
    """Derives the sizes of the tokenizer from the names and shapes of its arrays.

    Args:
      arrays: arrays by their original names. They do not determine the size of the images.

    Raises:
      PretrainedError: the arrays are not those of such a tokenizer.
    """
    numbers = [int(found[1]) for name in arrays if (found := re.match(r"encoder/ResBlock_(\d{1,4})/", name))]
    levels = sum(re.fullmatch(r"decoder/Conv_\d{1,3}/kernel", name) is not None for name in arrays) - 1
    blocks = max(numbers, default=-1) + 1
    try:
        if blocks != _BLOCKS * levels + _MIDDLE_BLOCKS:
            raise ValueError(f"{blocks} residual blocks in {levels} levels")
        hidden = arrays["encoder/Conv_0/kernel"].shape[-1]
        lasts = [f"encoder/ResBlock_{_BLOCKS * level + 1}/Conv_1/kernel" for level in range(levels)]
        widths = [arrays[name].shape[-1] for name in lasts]
        if any(width % hidden for width in widths):
            raise ValueError(f"levels of {widths} channels")
        vocab_size, code_dim = arrays["quantizer/codebook"].shape
        multipliers = tuple(width // hidden for width in widths)
        return options(vocab_size=vocab_size, code_dim=code_dim, hidden=hidden, multipliers=multipliers)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:  # a ConfigError is a ValueError
        raise PretrainedError(
            f"These are not the weights of MaskGIT's tokenizer: {error} (expected 'encoder/Conv_0/kernel', "
            "'encoder/ResBlock_0/Conv_0/kernel', 'decoder/Conv_1/kernel', 'quantizer/codebook' and the like)."
        ) from error


def convert(arrays: StateDict, o: VQGANOptions) -> PyTree:
    """Renames the original arrays; see `vqgan.convert`."""
    return vqgan_layout.convert(arrays, layout(o), channels_first=False)
