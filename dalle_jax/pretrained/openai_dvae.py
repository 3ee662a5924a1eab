"""Imports the published dVAE of DALL-E, or a dVAE of the same layout, as our parameters.

    python -m dalle_jax.pretrained openai-dvae --weights=encoder.pkl --weights=decoder.pkl --output=runs/openai-dvae

The output is a folder that `config.tokenizer_from` of a prior accepts. Files may be safetensors, npz, or written by
`torch.save`: a state dict, or a pickled module as OpenAI published it. `restricted_pickle` reads the latter without
torch and without running its code.

Layout of the original: `blocks.input.w`, `blocks.group_1.block_1.res_path.conv_1.w`, `….id_path.w`,
`blocks.output.conv.w`, each with a bias `.b`; convolution kernels are [out, in, height, width].
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dalle_jax.checkpoints import workdir
from dalle_jax.errors import PretrainedError, UserError
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.pretrained import state_dict
from dalle_jax.pretrained.importer import Importer, Setting
from dalle_jax.pytree import PyTree

StateDict = Mapping[str, np.ndarray]

# Classes in a published module, which become inert records.
_MODULE_CLASSES = frozenset(
    {
        "dall_e.encoder.Encoder",
        "dall_e.encoder.EncoderBlock",
        "dall_e.decoder.Decoder",
        "dall_e.decoder.DecoderBlock",
        "dall_e.utils.Conv2d",
        "torch.nn.modules.activation.ReLU",
        "torch.nn.modules.container.Sequential",
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.pooling.MaxPool2d",
        "torch.nn.modules.upsampling.Upsample",
    }
)

# -- conversion of the layout -------------------------------------------------------------------------------------


def options_of(encoder: StateDict, decoder: StateDict, image_size: int = 256) -> DVAEOptions:
    """Derives the sizes of the model from the shapes of its arrays.

    Args:
      encoder, decoder: arrays by their original names.
      image_size: side of the images in pixels, which the files do not determine.

    Raises:
      PretrainedError: the arrays are not those of such a model.
    """
    blocks = [re.match(r"blocks\.group_(\d{1,3})\.block_(\d{1,3})\.", name) for name in encoder]
    places = {(int(match[1]), int(match[2])) for match in blocks if match}
    try:
        groups, per_group = (max(numbers) for numbers in zip(*places))
        if len(places) != groups * per_group:
            raise ValueError(f"{len(places)} blocks in {groups} groups of {per_group}")
        vocab_size = encoder["blocks.output.conv.w"].shape[0]
        hidden, _, in_kernel, _ = encoder["blocks.input.w"].shape
        return DVAEOptions(
            image_size=image_size,
            vocab_size=vocab_size,
            hidden=hidden,
            groups=groups,
            blocks_per_group=per_group,
            codebook_dim=decoder["blocks.input.w"].shape[0],
            in_kernel=in_kernel,
        )
    except (KeyError, ValueError, IndexError) as error:  # a ConfigError is a ValueError
        raise PretrainedError(
            f"These are not the weights of a dVAE of DALL-E: {error} (expected 'blocks.input.w', "
            "'blocks.group_1.block_1.…' and 'blocks.output.conv.w' in the encoder, 'blocks.input.w' in the decoder)."
        ) from error


def convert(encoder: StateDict, decoder: StateDict, options: DVAEOptions) -> PyTree:
    """Renames and transposes the original arrays.

    Args:
      encoder, decoder: arrays by their original names.
      options: sizes, as from `options_of`.

    Returns:
      Parameters of `DVAETokenizer(options)`, float32 numpy arrays.

    Raises:
      PretrainedError: an array is missing, unexpected, or has a shape that does not match the options.
    """
    converted = {}
    for side, arrays in (("encoder", encoder), ("decoder", decoder)):
        for name, array in arrays.items():
            path = _our_path(side, name)
            if path is None:
                raise PretrainedError(f"The {side} has an unexpected array {name[:200]!r} of shape {array.shape}.")
            array = state_dict.as_float32(name, array)
            # OIHW to HWIO. Kernels of 1x1 become matrices [in, out]; the inputs of the codebook are the codes.
            if path[-1] == "kernel" and array.ndim == 4:
                array = array.transpose(2, 3, 1, 0)
                array = array[0, 0] if array.shape[:2] == (1, 1) else array
            converted[path] = array
    return state_dict.as_parameters(converted, DVAETokenizer(options).init, options)


def _our_path(side: str, name: str) -> tuple[str, ...] | None:
    """Returns the path in our tree of an array of the original, or None for an unknown name."""
    match = re.fullmatch(r"blocks\.(?:(input)|(output)\.conv|group_(\d+)\.block_(\d+)\.(.+))\.([wb])", name)
    if not match:
        return None
    is_input, is_output, group, block, inner, kind = match.groups()
    leaf = "kernel" if kind == "w" else "bias"
    if is_input:
        return ("codebook", leaf) if side == "decoder" else (side, "input", leaf)
    if is_output:
        return (side, "output", leaf)
    convolution = re.fullmatch(r"res_path\.(conv_[1-4])|(id_path)", inner)
    if not convolution:
        return None
    return (side, f"group_{group}_block_{block}", convolution[1] or "skip", leaf)


def load(encoder: str | os.PathLike, decoder: str | os.PathLike, image_size: int = 256) -> tuple[DVAETokenizer, PyTree]:
    """Loads an image tokenizer from two files.

    Args:
      encoder, decoder: the files, see `state_dict.read`.
      image_size: side of the images in pixels.

    Returns:
      The tokenizer and its float32 parameters.

    Raises:
      PretrainedError: a file cannot be read, or the files are not the two halves of one dVAE.
    """
    arrays = state_dict.read(encoder, _MODULE_CLASSES), state_dict.read(decoder, _MODULE_CLASSES)
    options = options_of(*arrays, image_size)
    return DVAETokenizer(options), jax.tree.map(jnp.asarray, convert(*arrays, options))


def _run(files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports the encoder and the decoder, in any order; see `Importer.run`."""
    first, second = files
    if _is_decoder(first) and not _is_decoder(second):
        first, second = second, first
    tokenizer, params = load(first, second, settings["image_size"])
    workdir.save_tokenizer(output, tokenizer, params)
    return str(tokenizer.options)


def _is_decoder(path: str | os.PathLike) -> bool:
    """Whether the first convolution of a file reads codes: an encoder's reads the 3 channels of pixels."""
    first = state_dict.read(path, _MODULE_CLASSES).get("blocks.input.w")
    return first is not None and first.ndim == 4 and first.shape[1] != 3


IMPORTER = Importer(
    name="openai-dvae",
    title="dVAE of DALL-E, f = 8, 8,192 codes",
    parameters=97_616_006,
    licence="modified MIT",
    source="github.com/openai/DALL-E (cdn.openai.com/dall-e/encoder.pkl and decoder.pkl)",
    files=("encoder.pkl", "decoder.pkl"),
    use="--config.tokenizer_from",
    run=_run,
    claims=lambda arrays: any(name.startswith("blocks.group_") for name in arrays),
    settings=(Setting("image_size", int, "Side of the images in pixels.", 256),),
    module_classes=_MODULE_CLASSES,
)


def main(argv: list[str]) -> None:
    """Imports the files given by the flags: the command of earlier versions."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments {argv[1:]}.")
    values = flags.FLAGS
    try:
        found = _run([values.encoder, values.decoder], values.output, {"image_size": values.image_size})
    except UserError as error:
        raise SystemExit(f"{error}") from error
    print(f"{values.output}: {found}")


if __name__ == "__main__":
    flags.DEFINE_string("encoder", None, "File of the encoder's weights.", required=True)
    flags.DEFINE_string("decoder", None, "File of the decoder's weights.", required=True)
    flags.DEFINE_string("output", None, "Folder to write the image tokenizer into.", required=True)
    flags.DEFINE_integer("image_size", 256, "Side of the images in pixels.")
    app.run(main)
