"""Imports DALL-E mini and DALL-E mega (github.com/borisdayma/dalle-mini) as workdirs of the autoregressive prior.

    python -m dalle_jax.pretrained dalle-mini --weights=encoder_mini.pt --weights=decoder_mini.pt \\
        --weights=flax_model.msgpack --vocabulary=FOLDER --output=runs/dalle-mini

The first two files are those of the package min-dalle (huggingface.co/kuprel/min-dalle). The third one is the VQGAN of
ImageNet with 16,384 codes that the models were trained with, as published by its authors (`last.ckpt`) or in Flax
(huggingface.co/dalle-mini/vqgan_imagenet_f16_16384). min-dalle's `detoker.pt` is the decoder of that VQGAN alone, and
a workdir needs its encoder, too.

An encoder reads the caption, and the image tokens read its states by cross-attention, see `priors/encoder.py`.
`dalle_mini_layout` has the names of the arrays.

The start of the image is row 16,384 of the image table in both models, because their configurations train with it
(`decoder_start_token_id`). It is the last row in mini; mega has 31 more, which are padding of the table. Versions of
min-dalle differ: the first ones began with the last row of the table, and 0.4.11 begins with row 16,383, which is a
code. `--start_id` repeats these.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dalle_jax.data.dalle_mini_text import DalleMiniText
from dalle_jax.errors import DataError, PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANTokenizer
from dalle_jax.pretrained import prior_run, state_dict, vqgan
from dalle_jax.pretrained.dalle_mini_layout import SIDES, Arrays, Sizes, check, convert, prior_of, side_of
from dalle_jax.pretrained.importer import Importer, Setting
from dalle_jax.pytree import PyTree
from dalle_jax.storage.files import expanded

_VQGAN = "vqgan-f16-16384"
_START = 2**14
PUBLISHED = {  # sizes, ending of the published files
    "dalle-mini": (Sizes(12, 1024, 16, 2730, text_ids=50_264, image_rows=16_385), "_mini"),
    "dalle-mega": (Sizes(24, 2048, 32, 4096, text_ids=50_272, image_rows=16_416), ""),
}


def read_vocabulary(
    name: str, path: str | os.PathLike, merges: str | os.PathLike | None, text_ids: int
) -> DalleMiniText:
    """Reads the text model.

    Args:
      name: a key of `PUBLISHED`.
      path: the published `vocab.json`, or a folder with it and `merges.txt`. In a folder, the published names of the
        model come first, such as `vocab_mini.json`.
      merges: the published `merges.txt`; None to find it in the folder.
      text_ids: number of text ids of the transformer. The text model has at most as many.

    Raises:
      DataError: a file is missing, damaged, or of another model.
    """
    folder, ending = expanded(path), PUBLISHED[name][1]
    if folder.is_dir():
        known = [(f"vocab{ending}.json", f"merges{ending}.txt"), ("vocab.json", "merges.txt")]
        pairs = [[folder / file for file in pair] for pair in known]
        complete = [pair for pair in pairs if all(file.exists() for file in pair)]
        if not complete:
            raise DataError(f"{path} has no {' and '.join(known[0])}. Download both files.")
        vocab, in_folder = complete[0]
        merges = merges or in_folder
    elif merges:
        vocab = path
    else:
        raise DataError(
            f"--vocabulary={path} is not a folder. Give one with vocab{ending}.json and merges{ending}.txt, or the "
            f"first file and --merges=merges{ending}.txt."
        )
    return DalleMiniText.of_files(vocab, merges, text_ids)


def _run(name: str, files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports encoder, decoder, image tokenizer and text model; see `Importer.run`."""
    prior_run.check_free(output)
    sizes, _ = PUBLISHED[name]
    *paths, vae = files
    sides = {}
    for side, path in zip(SIDES, paths):
        arrays = state_dict.read(path)
        try:
            check(arrays, side, sizes)
        except PretrainedError as error:
            raise PretrainedError(f"{path}: {error}") from error
        sides[side] = arrays
    tokenizer, tokenizer_params = _image_tokenizer(vae, sizes)
    text_model = read_vocabulary(name, settings["vocabulary"], settings["merges"], sizes.text_ids)
    prior = prior_of(sizes, settings["dtype"])
    try:
        params = convert(
            **sides, sizes=sizes, prior=prior, start_id=settings["start_id"], begin_id=text_model.begin_id,
            end_id=text_model.end_id,
        )  # fmt: skip
    except PretrainedError as error:
        raise PretrainedError(f"{' and '.join(map(str, paths))}: {error}") from error
    prior_run.save(output, name, prior, params, tokenizer, tokenizer_params, text_model)
    return f"captions of {sizes.text_length} tokens, {tokenizer.image_size} pixels, {prior_run.described(prior)}"


def _image_tokenizer(path: str | os.PathLike, sizes: Sizes) -> tuple[VQGANTokenizer, PyTree]:
    """Reads the VQGAN; raises a `PretrainedError` for other files, and for its decoder alone."""
    arrays = vqgan.read(path)
    if "embedding.weight" in arrays and "decoder.conv_in.weight" in arrays and "encoder.conv_in.weight" not in arrays:
        raise PretrainedError(
            f"{path} is the decoder of a VQGAN alone (min-dalle's detoker.pt). A workdir also needs the encoder. Give "
            "the whole VQGAN of ImageNet with f = 16 and 16,384 codes: "
            "--weights=hf://dalle-mini/vqgan_imagenet_f16_16384/flax_model.msgpack, or last.ckpt of its authors."
        )
    options = vqgan.PUBLISHED[_VQGAN]
    return vqgan.load(path, options, sizes.side * options.downsample)


def _claims(name: str, arrays: Arrays) -> bool:
    side = side_of(arrays)
    if side is None:
        return vqgan.published_name(arrays) == _VQGAN
    try:
        check(arrays, side, PUBLISHED[name][0])
    except PretrainedError:
        return False
    return True


def _importer(name: str, title: str, parameters: int) -> Importer:
    ending = PUBLISHED[name][1]
    return Importer(
        name=name,
        title=f"{title}, 256 x 256 pixels, English captions, with its VQGAN and text model",
        parameters=parameters,
        licence="Apache-2.0",
        source="huggingface.co/kuprel/min-dalle, and huggingface.co/dalle-mini/vqgan_imagenet_f16_16384",
        files=(f"encoder{ending}.pt", f"decoder{ending}.pt", "flax_model.msgpack"),
        use="--config.model_workdir",
        run=functools.partial(_run, name),
        claims=functools.partial(_claims, name),
        settings=(
            Setting("vocabulary", str, f"vocab{ending}.json, or a folder with merges{ending}.txt.", required=True),
            Setting("merges", str, f"merges{ending}.txt, unless --vocabulary is a folder."),
            Setting("start_id", int, "Row of the image table that begins an image.", _START),
            Setting("dtype", str, prior_run.DTYPE_HELP, "float32", choices=prior_run.DTYPES),
        ),
    )


_OF_VQGAN = 76_073_859
IMPORTERS = (
    _importer("dalle-mini", "DALL-E mini", 437_833_712 + _OF_VQGAN),
    _importer("dalle-mega", "DALL-E mega", 2_587_521_024 + _OF_VQGAN),
)
