"""Imports the image tokenizers of LlamaGen (arXiv 2406.06525), as parameters of `VQGANTokenizer`.

    python -m dalle_jax.pretrained llamagen-vq-ds16 --weights=vq_ds16_c2i.pt --output=runs/llamagen-vq

The network is the VQGAN of taming transformers with attention in the last level, and with normalised codes of width 8.
Files are the authors' checkpoints with the state dict under "model", or safetensors or npz with the same names. The
record of used codes (`quantize.codebook_used`) is dropped.

Layout of the original, with kernels [out, in, height, width]:

    encoder.{conv_in,norm_out,conv_out}             encoder.conv_blocks.1.res.0.{norm1,conv1,norm2,conv2,nin_shortcut}
    encoder.mid.{0,2}.{norm1,…}, encoder.mid.1.q    encoder.conv_blocks.4.attn.0.{norm,q,k,v,proj_out}
    encoder.conv_blocks.0.downsample.conv           quant_conv, post_quant_conv, quantize.embedding
    decoder.…                                       with `upsample`; its conv_blocks.0 is the coarsest level
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.checkpoints import workdir
from dalle_jax.errors import PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANOptions, VQGANTokenizer
from dalle_jax.pretrained import state_dict, vqgan, vqgan_layout
from dalle_jax.pretrained.importer import Importer, Setting
from dalle_jax.pretrained.vqgan_layout import Layout, StateDict
from dalle_jax.pytree import PyTree

PUBLISHED = {
    "llamagen-vq-ds16": VQGANOptions(vocab_size=16384, code_dim=8, normalized_codes=True),
    "llamagen-vq-ds8": VQGANOptions(
        vocab_size=16384, code_dim=8, normalized_codes=True, multipliers=(1, 2, 2, 4), attention_levels=(3,)
    ),
}
_NOT_PARAMETERS = ("quantize.codebook_used",)
_MIDDLE = {"block_1": "0", "attn_1": "1", "block_2": "2"}


def original_name(path: tuple[str, ...], options: VQGANOptions) -> str:
    """Returns the name of an array in the original by its path in our tree."""
    name = vqgan.original_name(path, options)
    if found := re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(.*)", name):
        side, level, rest = found.groups()
        number = int(level) if side == "encoder.down" else len(options.multipliers) - 1 - int(level)
        rest = re.sub(r"^block\.", "res.", rest)
        return f"{side.partition('.')[0]}.conv_blocks.{number}.{rest}"
    return re.sub(r"\.mid\.(\w+)\.", lambda found: f".mid.{_MIDDLE[found[1]]}.", name)


def layout(options: VQGANOptions) -> Layout:
    """Returns the path in our tree and the original shape of each array, by its original name."""
    return vqgan_layout.torch_layout(options, original_name)


def _parameters(arrays: StateDict) -> StateDict:
    return {name: array for name, array in arrays.items() if name not in _NOT_PARAMETERS}


def convert(arrays: StateDict, options: VQGANOptions) -> PyTree:
    """Renames and transposes the original arrays; see `vqgan.convert`."""
    return vqgan_layout.convert(_parameters(arrays), layout(options))


def load(weights: str | os.PathLike, options: VQGANOptions, image_size: int = 256) -> tuple[VQGANTokenizer, PyTree]:
    """Loads a tokenizer from a file.

    Args:
      weights: the file, see `state_dict.read`.
      options: the sizes that the file must have, one of `PUBLISHED`.
      image_size: side of the images in pixels.

    Returns:
      The tokenizer and its float32 parameters.

    Raises:
      PretrainedError: the file cannot be read, or does not hold such a model.
      ConfigError: the image size is not a multiple of `downsample`.
    """
    sized = dataclasses.replace(options, image_size=image_size)
    arrays = state_dict.read(weights)
    try:
        params = convert(arrays, options)
    except PretrainedError as error:
        raise PretrainedError(f"{weights}: {error}") from error
    return VQGANTokenizer(sized), jax.tree.map(jnp.asarray, params)


def _run(name: str, files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports a file as the importer `name`; see `Importer.run`."""
    tokenizer, params = load(files[0], PUBLISHED[name], settings["image_size"])
    workdir.save_tokenizer(output, tokenizer, params)
    return str(tokenizer.options)


def _claims(name: str, arrays: StateDict) -> bool:
    return vqgan_layout.fits(_parameters(arrays), layout(PUBLISHED[name]))


def _importer(name: str, title: str, parameters: int, file: str) -> Importer:
    return Importer(
        name=name,
        title=title,
        parameters=parameters,
        licence="MIT",
        source="github.com/FoundationVision/LlamaGen (huggingface.co/FoundationVision/LlamaGen)",
        files=(file,),
        use="--config.tokenizer_from",
        run=functools.partial(_run, name),
        claims=functools.partial(_claims, name),
        settings=(Setting("image_size", int, "Side of the images in pixels.", 256),),
    )


IMPORTERS = (
    _importer("llamagen-vq-ds16", "LlamaGen's tokenizer, f = 16, 16,384 codes of 8", 71_883_403, "vq_ds16_c2i.pt"),
    _importer("llamagen-vq-ds8", "LlamaGen's tokenizer, f = 8, 16,384 codes of 8", 70_109_835, "vq_ds8_c2i.pt"),
)
