"""Imports minDALL-E (github.com/kakaobrain/minDALL-E) as a workdir of the autoregressive prior.

    python -m dalle_jax.pretrained mindalle --weights=stage2_last.ckpt --weights=stage1_last.ckpt \\
        --vocabulary=tokenizer --output=runs/mindalle

The published archive holds both checkpoints and the folder `tokenizer` with `bpe-16k-vocab.json` and
`bpe-16k-merges.txt`. A `tokenizer.json` of Hugging Face whose last id is `[PAD]` serves as well. The package
`tokenizers` encodes captions (`pip install -e '.[clip]'`).

Layout of the original transformer, with weights [out, in]. The names may begin with `stage2.`:

    tok_emb_{txt,img}, pos_emb_{txt,img}, blocks.0.{ln1,ln2,attn.{query,key,value,proj},mlp.0,mlp.2}, ln_f,
    head_{txt,img}

The last text id is that of padding, so that our padding at all text positions has its embedding. The image tokenizer is
the VQGAN of taming transformers with 16,384 codes, fine-tuned, whose names may begin with `stage1.`.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.data import text_models
from dalle_jax.data.json_tokenizer import JsonTokenizer
from dalle_jax.data.text import CaptionModel
from dalle_jax.errors import DataError, PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANTokenizer
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.pretrained import prior_run, state_dict, vqgan
from dalle_jax.pretrained.importer import Importer, Setting
from dalle_jax.priors.autoregressive import AutoregressivePrior
from dalle_jax.priors.autoregressive_model import AutoregressiveOptions
from dalle_jax.priors.condition import Text
from dalle_jax.pytree import PyTree
from dalle_jax.storage.files import expanded
from dalle_jax.token_layout import TokenLayout

Arrays = Mapping[str, np.ndarray]

NAME = "mindalle"
_HEAD_SIZE = 64  # of the published model, whose arrays do not determine it
_SHAPES = {  # D width, F hidden, T text positions, N image tokens, W text ids, V codes
    "tok_emb_txt.weight": "WD",
    "tok_emb_img.weight": "VD",
    "pos_emb_txt.weight": "TD",
    "pos_emb_img.weight": "ND",
    "ln_f.weight": "D",
    "ln_f.bias": "D",
    "head_txt.weight": "WD",
    "head_img.weight": "VD",
}
_SHAPES_OF_LAYER = {
    **{f"{norm}.{part}": "D" for norm in ("ln1", "ln2") for part in ("weight", "bias")},
    **{f"attn.{name}.weight": "DD" for name in ("query", "key", "value", "proj")},
    **{f"attn.{name}.bias": "D" for name in ("query", "key", "value", "proj")},
    "mlp.0.weight": "FD",
    "mlp.0.bias": "F",
    "mlp.2.weight": "DF",
    "mlp.2.bias": "D",
}
_MAX_DEPTH = 1000
PUBLISHED = (42, {"D": 1536, "F": 6144, "T": 64, "N": 256, "W": 16_384, "V": 16_384})  # depth, sizes


def shapes(depth: int, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array of a transformer by its original name.

    Args:
      depth: number of layers.
      sizes: the sizes of `_SHAPES` by their letters.
    """
    names = dict(_SHAPES)
    for layer in range(depth):
        names |= {f"blocks.{layer}.{name}": letters for name, letters in _SHAPES_OF_LAYER.items()}
    return {name: tuple(sizes[letter] for letter in letters) for name, letters in names.items()}


def stage(arrays: Arrays, number: int) -> dict[str, np.ndarray]:
    """Returns the arrays of a stage by their names without "stage1." or "stage2.", and without those of the other."""
    prefix, other = f"stage{number}.", f"stage{3 - number}."
    return {name.removeprefix(prefix): array for name, array in arrays.items() if not name.startswith(other)}


def prior_of(arrays: Arrays, head_size: int = _HEAD_SIZE, dtype: str = "float32") -> AutoregressivePrior:
    """Derives the prior from the names and shapes of the transformer's arrays, all of which are compared.

    Args:
      arrays: arrays by their original names.
      head_size: size of an attention head.
      dtype: of products and activations.

    Raises:
      PretrainedError: the arrays are not those of such a model.
    """
    layers = {int(found[1]) for name in arrays if (found := re.match(r"blocks\.(\d{1,4})\.", name))}
    try:
        (text_ids, width), (codes, _) = arrays["tok_emb_txt.weight"].shape, arrays["tok_emb_img.weight"].shape
        length, tokens = (len(arrays[f"pos_emb_{kind}.weight"]) for kind in ("txt", "img"))
        hidden, depth = len(arrays["blocks.0.mlp.0.weight"]), max(layers) + 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"{depth} layers")
        side = math.isqrt(tokens)
        if side**2 != tokens or min(side, text_ids - 1, width, hidden) < 1 or width % head_size:
            raise ValueError(f"{tokens} image tokens, {text_ids} text ids, width {width}")
    except (KeyError, ValueError, TypeError) as error:  # a TypeError is the length of an array without axes
        raise PretrainedError(
            f"These are not the weights of minDALL-E's transformer: {error} (expected 'tok_emb_txt.weight', "
            "'tok_emb_img.weight', 'blocks.0.mlp.0.weight', 'pos_emb_img.weight' and the like)."
        ) from error
    sizes = {"D": width, "F": hidden, "T": length, "N": tokens, "W": text_ids, "V": codes}
    state_dict.check_shapes(arrays, shapes(depth, sizes))
    trunk = TransformerOptions(
        width=width, depth=depth, heads=width // head_size, mlp_ratio=hidden / width, activation="gelu",
        qkv_bias=True, positions="table", dtype=dtype, scan=False,
    )  # fmt: skip
    options = AutoregressiveOptions(trunk=trunk, attention="full", caption_drop=0.0)
    return AutoregressivePrior(TokenLayout(Text(text_ids - 1, length), codes, side, side), options)


def convert(arrays: dict[str, np.ndarray], prior: AutoregressivePrior) -> PyTree:
    """Renames, joins and transposes the arrays of the transformer.

    Args:
      arrays: arrays by their original names, as `prior_of` has checked them. They are removed one by one, so that the
        memory holds few of them twice.
      prior: as from `prior_of`.

    Returns:
      Parameters of the prior, float32 numpy arrays.

    Raises:
      PretrainedError: an array holds no finite floats.
    """
    trunk, padding = prior.options.trunk, prior.layout.condition.length
    take = lambda name: state_dict.as_float32(name, arrays.pop(name))
    words = take("tok_emb_txt.weight")
    found = {
        ("embedding", "text"): np.concatenate([words[:-1], np.repeat(words[-1:], padding, axis=0)]),
        ("embedding", "image"): take("tok_emb_img.weight"),
        ("embedding", "text_positions"): take("pos_emb_txt.weight"),
        ("embedding", "cells"): take("pos_emb_img.weight"),
        ("embedding", "text_head_kernel"): take("head_txt.weight"),
        ("embedding", "image_head_kernel"): take("head_img.weight"),
    }

    def norm(ours: tuple[str, ...], name: str) -> None:
        for ours_leaf, leaf in (("scale", "weight"), ("bias", "bias")):
            found[(*ours, "norm", ours_leaf)] = take(f"{name}.{leaf}")

    norm(("trunk", "final_norm"), "ln_f")
    heads = (trunk.heads, trunk.size_per_head)
    for layer in range(trunk.depth):
        ours, theirs = ("trunk", f"layer_{layer}"), f"blocks.{layer}"
        norm((*ours, "attention_norm"), f"{theirs}.ln1")
        norm((*ours, "mlp_norm"), f"{theirs}.ln2")
        parts = [f"{theirs}.attn.{part}" for part in ("query", "key", "value")]
        kernels = [take(f"{part}.weight").T.reshape(trunk.width, *heads) for part in parts]
        found[(*ours, "attention", "qkv", "kernel")] = np.stack(kernels, axis=1)
        found[(*ours, "attention", "qkv", "bias")] = np.stack([take(f"{part}.bias").reshape(heads) for part in parts])
        found[(*ours, "attention", "out", "kernel")] = take(f"{theirs}.attn.proj.weight").T.reshape(*heads, trunk.width)
        found[(*ours, "attention", "out", "bias")] = take(f"{theirs}.attn.proj.bias")
        for place, number in (("up", 0), ("down", 2)):
            found[(*ours, "mlp", place, "kernel")] = np.ascontiguousarray(take(f"{theirs}.mlp.{number}.weight").T)
            found[(*ours, "mlp", place, "bias")] = take(f"{theirs}.mlp.{number}.bias")
    return state_dict.as_parameters(found, prior.init, prior.options)


# -- files --------------------------------------------------------------------------------------------------------


def read_vocabulary(path: str | os.PathLike, text_ids: int) -> CaptionModel:
    """Reads the text model: the published folder, or a `tokenizer.json`.

    Args:
      path: folder or file.
      text_ids: number of text ids of the transformer, padding included.

    Raises:
      DataError: the path holds no text model, or one with another number of ids.
    """
    model = JsonTokenizer.of_char_bpe(path) if expanded(path).is_dir() else text_models.load(path)
    if model.vocab_size != text_ids - 1:
        raise DataError(
            f"--vocabulary={path} has {model.vocab_size} ids without padding, and the transformer has {text_ids - 1}: "
            "give the vocabulary that was published with it."
        )
    return model


def _run(files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports the two files, in any order; see `Importer.run`."""
    prior_run.check_free(output)
    second, first = files
    arrays, image_arrays = state_dict.read(second), state_dict.read(first)
    if _is_transformer(image_arrays) and not _is_transformer(arrays):
        second, first, arrays, image_arrays = first, second, image_arrays, arrays
    arrays, image_arrays = stage(arrays, 2), stage(image_arrays, 1)
    try:
        prior = prior_of(arrays, settings["head_size"], settings["dtype"])
    except PretrainedError as error:
        raise PretrainedError(f"{second}: {error}") from error
    try:
        options = vqgan.options_of(image_arrays)
        if options.vocab_size != prior.layout.image_vocab:
            raise PretrainedError(f"{options.vocab_size} codes, and the transformer has {prior.layout.image_vocab}.")
        image_size = prior.layout.height * options.downsample
        tokenizer = VQGANTokenizer(dataclasses.replace(options, image_size=image_size))
        image_params = vqgan.convert(image_arrays, options)
    except PretrainedError as error:
        raise PretrainedError(f"{first}: {error}") from error
    vocabulary = read_vocabulary(settings["vocabulary"], prior.layout.condition.vocab + 1)
    try:
        params = convert(arrays, prior)
    except PretrainedError as error:
        raise PretrainedError(f"{second}: {error}") from error
    prior_run.save(output, NAME, prior, params, tokenizer, image_params, vocabulary)
    return f"{image_size} pixels, {prior_run.described(prior)}"


def _is_transformer(arrays: Arrays) -> bool:
    return "tok_emb_img.weight" in stage(arrays, 2)


def _claims(arrays: Arrays) -> bool:
    if not _is_transformer(arrays):
        return vqgan.published_name(stage(arrays, 1)) == "vqgan-f16-16384"
    try:
        return bool(prior_of(stage(arrays, 2), 1))
    except PretrainedError:
        return False


IMPORTER = Importer(
    name=NAME,
    title="minDALL-E of Conceptual Captions, 256 x 256 pixels, with its VQGAN and text model",
    parameters=1_367_155_587,
    licence="CC-BY-NC-SA-4.0",
    source="github.com/kakaobrain/minDALL-E (arena.kakaocdn.net/brainrepo/models/minDALL-E, 1.3B.tar.gz)",
    files=("stage2_last.ckpt", "stage1_last.ckpt"),
    use="--config.model_workdir",
    run=_run,
    claims=_claims,
    settings=(
        Setting("vocabulary", str, "Folder `tokenizer` of the archive, or a tokenizer.json.", required=True),
        Setting("head_size", int, "Size of an attention head.", _HEAD_SIZE),
        Setting("dtype", str, prior_run.DTYPE_HELP, "float32", choices=prior_run.DTYPES),
    ),
)
