"""Imports VQGANs of taming transformers, the published ones or your own, as parameters of `VQGANTokenizer`.

    python -m dalle_jax.pretrained vqgan-f16-1024 --weights=last.ckpt --output=runs/vqgan

Files are checkpoints of the authors' code, with the state dict under "state_dict", or safetensors or npz with the same
names. The arrays of the losses (`loss.…`: the discriminator and LPIPS) and of the optimisers are dropped. Flax files of
DALL-E mini's port (`flax_model.msgpack`) serve as well, see `vqgan_layout.from_flax`.

Layout of the original, with kernels [out, in, height, width]:

    encoder.{conv_in,norm_out,conv_out}                 encoder.down.1.block.0.{norm1,conv1,norm2,conv2,nin_shortcut}
    encoder.mid.{block_1,attn_1,block_2}                encoder.down.4.attn.0.{norm,q,k,v,proj_out}
    encoder.down.0.downsample.conv                      decoder.… with `up` and `upsample` in place of `down`
    quant_conv, post_quant_conv                         quantize.embedding, or quantize.{proj,embed} in a GumbelVQ
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
import numpy as np

from dalle_jax.checkpoints import workdir
from dalle_jax.errors import PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANOptions, VQGANTokenizer
from dalle_jax.pretrained import state_dict, vqgan_layout
from dalle_jax.pretrained.importer import Importer, Setting
from dalle_jax.pretrained.vqgan_layout import Layout, StateDict
from dalle_jax.pytree import PyTree

# The published models.
PUBLISHED = {
    "vqgan-f16-1024": VQGANOptions(),
    "vqgan-f16-16384": VQGANOptions(vocab_size=16384),
    "vqgan-gumbel-f8": VQGANOptions(
        vocab_size=8192, multipliers=(1, 1, 2, 4), attention_levels=(3,), quantizer="gumbel"
    ),
}
OWN = "vqgan"  # the importer of all other sizes
# The losses of the training, and a fixed matrix that draws segmentations in colour.
_NOT_PARAMETERS = re.compile(r"loss\..*|colorize")

# -- conversion of the layout -------------------------------------------------------------------------------------


def original_name(path: tuple[str, ...], options: VQGANOptions) -> str:
    """Returns the name of an array in the original by its path in our tree."""
    if path[0] == "codes":
        return _CODES[options.quantizer]
    leaf = "bias" if path[-1] == "bias" else "weight"
    if path[0] in _AROUND_CODES:
        return f"{_AROUND_CODES[path[0]]}.{leaf}"
    side, *inner, _ = path
    ways = "down" if side == "encoder" else "up"
    if found := re.fullmatch(r"level_(\d+)_(?:(block|attention)_(\d+)|down|up)", inner[0]):
        level, part, number = found.groups()
        if part is None:
            return f"{side}.{ways}.{level}.{ways}sample.conv.{leaf}"
        part, place = ("attn", _ATTENTION) if part == "attention" else ("block", _PLACES)
        return f"{side}.{ways}.{level}.{part}.{number}.{place[inner[1]]}.{leaf}"
    if inner[0] == "middle":
        part, place = ("attn_1", _ATTENTION) if inner[1] == "attention" else (inner[1], _PLACES)
        return f"{side}.mid.{part}.{place[inner[2]]}.{leaf}"
    return f"{side}.{_PLACES[inner[0]]}.{leaf}"


_PLACES = {
    "input": "conv_in", "norm": "norm_out", "output": "conv_out", "norm_1": "norm1", "norm_2": "norm2",
    "conv_1": "conv1", "conv_2": "conv2", "skip": "nin_shortcut",
}  # fmt: skip
_ATTENTION = {"norm": "norm", "query": "q", "key": "k", "value": "v", "out": "proj_out"}
_CODES = {"gumbel": "quantize.embed.weight", "nearest": "quantize.embedding.weight"}
_AROUND_CODES = {"to_codes": "quant_conv", "from_codes": "post_quant_conv", "logits": "quantize.proj"}


def layout(options: VQGANOptions) -> Layout:
    """Returns the path in our tree and the original shape of each array, by its original name."""
    return vqgan_layout.torch_layout(options, original_name)


def options_of(arrays: StateDict, image_size: int = 256) -> VQGANOptions:
    """Derives the sizes of the model from the names and shapes of its arrays.

    Args:
      arrays: arrays by their original names.
      image_size: side of the images in pixels, which the files do not determine.

    Raises:
      PretrainedError: the arrays are not those of such a model.
    """

    found = [re.match(r"encoder\.down\.(\d{1,3})\.(block|attn)\.(\d{1,3})\.", name) for name in arrays]
    places = {(match[2], int(match[1]), int(match[3])) for match in found if match}
    blocks = [(level, number) for part, level, number in places if part == "block"]
    quantizer = "gumbel" if "quantize.proj.weight" in arrays else "nearest"
    try:
        levels, per_level = (1 + max(numbers) for numbers in zip(*blocks))
        if len(blocks) != levels * per_level:
            raise ValueError(f"{len(blocks)} blocks in {levels} levels of {per_level}")
        hidden = arrays["encoder.conv_in.weight"].shape[0]
        widths = [arrays[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in range(levels)]
        if any(width % hidden for width in widths):
            raise ValueError(f"levels of {widths} channels")
        vocab_size, code_dim = arrays[_CODES[quantizer]].shape
        return VQGANOptions(
            image_size=image_size,
            vocab_size=vocab_size,
            code_dim=code_dim,
            latent=arrays["quant_conv.weight"].shape[1],
            hidden=hidden,
            multipliers=tuple(width // hidden for width in widths),
            blocks=per_level,
            attention_levels=tuple(sorted({level for part, level, _ in places if part == "attn"})),
            quantizer=quantizer,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:  # a ConfigError is a ValueError
        raise PretrainedError(
            f"These are not the weights of a VQGAN of taming transformers: {error} (expected 'encoder.conv_in.weight', "
            "'encoder.down.0.block.0.conv1.weight', 'quant_conv.weight', 'quantize.embedding.weight' and the like)."
        ) from error


def convert(arrays: StateDict, options: VQGANOptions) -> PyTree:
    """Renames and transposes the original arrays.

    Args:
      arrays: arrays by their original names. Those of the losses are ignored.
      options: sizes, as from `options_of`.

    Returns:
      Parameters of `VQGANTokenizer(options)`, float32 numpy arrays.

    Raises:
      PretrainedError: arrays are missing, unexpected, of another shape, or damaged.
    """
    return vqgan_layout.convert(_parameters(arrays), layout(options))


def _parameters(arrays: StateDict) -> StateDict:
    """Returns the arrays without those of the losses."""
    return {name: array for name, array in arrays.items() if not _NOT_PARAMETERS.fullmatch(name)}


# -- files --------------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a file by the names of taming transformers. Errors as in `state_dict.read`."""
    return vqgan_layout.from_flax(state_dict.read(path))


def load(
    weights: str | os.PathLike, options: VQGANOptions | None = None, image_size: int = 256
) -> tuple[VQGANTokenizer, PyTree]:
    """Loads a VQGAN from a file.

    Args:
      weights: the file, see `state_dict.read`.
      options: the sizes that the file must have, one of `PUBLISHED`; None derives them from the file.
      image_size: side of the images in pixels.

    Returns:
      The tokenizer and its float32 parameters.

    Raises:
      PretrainedError: the file cannot be read, or does not hold such a model.
      ConfigError: the image size is not a multiple of `downsample`.
    """
    arrays = read(weights)
    try:
        options = options_of(arrays) if options is None else options
        params = convert(arrays, options)
    except PretrainedError as error:
        raise PretrainedError(f"{weights}: {error}") from error
    sized = dataclasses.replace(options, image_size=image_size)
    return VQGANTokenizer(sized), jax.tree.map(jnp.asarray, params)


def published_name(arrays: StateDict) -> str | None:
    """Returns the importer of a VQGAN's arrays: a key of `PUBLISHED`, or `OWN`; None if they are no whole VQGAN."""
    arrays = vqgan_layout.from_flax(arrays)
    try:
        found = options_of(arrays)
        vqgan_layout.check(_parameters(arrays), layout(found))
    except PretrainedError:
        return None
    return next((name for name, options in PUBLISHED.items() if options == found), OWN)


def _run(name: str, files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports a file as the importer `name`; see `Importer.run`."""
    options = PUBLISHED.get(name)
    tokenizer, params = load(files[0], options, settings["image_size"])
    if options is None and published_name(state_dict.read(files[0])) != OWN:
        raise PretrainedError(f"{files[0]} has the sizes of a published VQGAN.")
    workdir.save_tokenizer(output, tokenizer, params)
    return str(tokenizer.options)


def _importer(name: str, title: str, parameters: int | None, source: str) -> Importer:
    return Importer(
        name=name,
        title=title,
        parameters=parameters,
        licence="MIT" if parameters else "yours",
        source=source,
        files=("last.ckpt",),
        use="--config.tokenizer_from",
        run=functools.partial(_run, name),
        claims=lambda arrays: published_name(arrays) == name,
        settings=(Setting("image_size", int, "Side of the images in pixels.", 256),),
    )


_AUTHORS = "github.com/CompVis/taming-transformers (heibox.uni-heidelberg.de/d/{})"
IMPORTERS = (
    _importer(
        "vqgan-f16-1024",
        "VQGAN of ImageNet, f = 16, 1,024 codes",
        72_141_699,
        _AUTHORS.format("8088892a516d4e3baf92"),
    ),
    _importer(
        "vqgan-f16-16384",
        "VQGAN of ImageNet, f = 16, 16,384 codes",
        76_073_859,
        _AUTHORS.format("a7530b09fed84f80a887"),
    ),
    _importer(
        "vqgan-gumbel-f8",
        "GumbelVQ of OpenImages, f = 8, 8,192 codes",
        68_995_971,
        _AUTHORS.format("2e5662443a6b4307b470"),
    ),
    _importer(OWN, "VQGAN or GumbelVQ of other sizes", None, "your own training with the code of taming transformers"),
)
