"""Imports MaskGIT's class-conditional models of ImageNet (arXiv 2202.04200) as workdirs of the MaskGIT prior.

    python -m dalle_jax.pretrained maskgit-imagenet256 --weights=maskgit_imagenet256_checkpoint \\
        --weights=tokenizer_imagenet256_checkpoint --output=runs/maskgit-imagenet256

The text model has one token, the class: `--config.prompts="class: 207"`. A file with one name in each line, class 0
first (`--names=FILE`), allows prompts such as "golden retriever".

Layout of the original transformer, a Flax checkpoint:

    Embed_0/{word_embeddings,position_embeddings}/embedding, Embed_0/embeddings_ln
    TransformerLayer_0/Attention_0/{self_attention/{query,key,value,out},attention_output_ln}
    TransformerLayer_0/Mlp_0/{intermediate_output,layer_output,layer_output_ln}
    MlmLayer_0/{mlm_dense,mlm_ln,mlm_bias}

Its one table of words holds the codes, then the classes, then the mask. The original draws from the logits of the codes
only, and so the biases of classes and mask are dropped. Our empty caption has the embedding of the mask, because the
original was trained without one. `maskgit_tokenizer` reads the image tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.data.labels import Labels
from dalle_jax.errors import PretrainedError
from dalle_jax.image_tokenizers.vqgan import VQGANTokenizer
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.pretrained import maskgit_tokenizer, prior_run, state_dict
from dalle_jax.pretrained.importer import Importer, Setting
from dalle_jax.priors.condition import Label
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout

Arrays = Mapping[str, np.ndarray]

PUBLISHED = {"maskgit-imagenet256": (16, 8), "maskgit-imagenet512": (32, 12)}  # side of the grid, decoding steps
_WORDS, _POSITIONS = (f"Embed_0/{kind}_embeddings/embedding" for kind in ("word", "position"))
_SHAPES_OF_LAYER = {  # D width, H heads, K head size, F hidden
    **{f"Attention_0/self_attention/{part}/kernel": "DHK" for part in ("query", "key", "value")},
    **{f"Attention_0/self_attention/{part}/bias": "HK" for part in ("query", "key", "value")},
    "Attention_0/self_attention/out/kernel": "HKD",
    "Attention_0/self_attention/out/bias": "D",
    **{f"Attention_0/attention_output_ln/{part}": "D" for part in ("scale", "bias")},
    "Mlp_0/intermediate_output/kernel": "DF",
    "Mlp_0/intermediate_output/bias": "F",
    "Mlp_0/layer_output/kernel": "FD",
    "Mlp_0/layer_output/bias": "D",
    **{f"Mlp_0/layer_output_ln/{part}": "D" for part in ("scale", "bias")},
}
_SHAPES = {  # W words, S positions
    _WORDS: "WD",
    _POSITIONS: "SD",
    **{f"Embed_0/embeddings_ln/{part}": "D" for part in ("scale", "bias")},
    "MlmLayer_0/mlm_dense/kernel": "DD",
    "MlmLayer_0/mlm_dense/bias": "D",
    **{f"MlmLayer_0/mlm_ln/{part}": "D" for part in ("scale", "bias")},
    "MlmLayer_0/mlm_bias/bias": "W",
}
_MAX_DEPTH = 1000


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a transformer that its arrays determine.

    Attributes:
      depth: number of layers.
      by_letter: the sizes of `_SHAPES` and `_SHAPES_OF_LAYER`.
    """

    depth: int
    by_letter: Mapping[str, int]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array by its original name."""
        names = dict(_SHAPES)
        for layer in range(self.depth):
            names |= {f"TransformerLayer_{layer}/{name}": letters for name, letters in _SHAPES_OF_LAYER.items()}
        return {name: tuple(self.by_letter[letter] for letter in letters) for name, letters in names.items()}


def published_sizes(side: int) -> Sizes:
    """Returns the sizes of the published transformer with side x side tokens of 1,024 codes and 1,000 classes."""
    return Sizes(24, {"D": 768, "H": 16, "K": 48, "F": 3072, "W": 1024 + 1000 + 1, "S": side**2 + 1})


def sizes_of(arrays: Arrays) -> Sizes:
    """Derives the sizes of a transformer from its arrays.

    Raises:
      PretrainedError: the arrays are not those of such a model.
    """
    layers = {int(found[1]) for name in arrays if (found := re.match(r"TransformerLayer_(\d{1,4})/", name))}
    first = {name: f"TransformerLayer_0/{name}" for name in _SHAPES_OF_LAYER}
    query, up = first["Attention_0/self_attention/query/kernel"], first["Mlp_0/intermediate_output/kernel"]
    try:
        (words, width), (positions, _) = arrays[_WORDS].shape, arrays[_POSITIONS].shape
        (_, heads, size), (_, hidden) = arrays[query].shape, arrays[up].shape
        if not 1 <= max(layers) + 1 <= _MAX_DEPTH:
            raise ValueError(f"{max(layers) + 1} layers")
    except (KeyError, ValueError) as error:
        raise PretrainedError(
            f"These are not the weights of MaskGIT's transformer: {error} (expected {_WORDS!r}, {_POSITIONS!r}, "
            f"{query!r} and the like)."
        ) from error
    sizes = {"D": width, "H": heads, "K": size, "F": hidden, "W": words, "S": positions}
    return Sizes(max(layers) + 1, sizes)


def check(arrays: Arrays) -> Sizes:
    """Returns the sizes of a transformer after a comparison of all names and shapes; raises a `PretrainedError`."""
    sizes = sizes_of(arrays)
    state_dict.check_shapes(arrays, sizes.shapes())
    return sizes


def prior_of(sizes: Sizes, codes: int, steps: int, dtype: str = "float32") -> MaskGITPrior:
    """Builds the prior of a transformer.

    Args:
      sizes: of the transformer.
      codes: number of codes of its image tokenizer.
      steps: default number of decoding steps.
      dtype: of products and activations.

    Raises:
      PretrainedError: the positions are no square of image tokens and one class, or there are more codes than words.
    """
    size = sizes.by_letter
    side, classes = math.isqrt(size["S"] - 1), size["W"] - codes - 1
    if side**2 != size["S"] - 1 or side < 1:
        raise PretrainedError(f"{_POSITIONS} has {size['S']} rows: expected one and a square number of image tokens.")
    if classes < 1:
        raise PretrainedError(
            f"{_WORDS} has {size['W']} rows, but the image tokenizer has {codes} codes: expected the codes, at least "
            "one class, and the mask. Both files must be those of one model."
        )
    trunk = TransformerOptions(
        width=size["D"], depth=sizes.depth, heads=size["H"], head_dim=size["K"], mlp_ratio=size["F"] / size["D"],
        norm_placement="post", norm_epsilon=1e-12, embedding_norm=True, final_norms=0, activation="gelu_tanh",
        qkv_bias=True, positions="table", dropout=0.1, attention_dropout=0.1, dtype=dtype, scan=False,
    )  # fmt: skip
    options = MaskGITOptions(
        trunk=trunk, head_activation="gelu_tanh", text_reads_image=True, init_scale=0.02, loss_average="images",
        caption_drop=0.0, steps=steps,
    )  # fmt: skip
    return MaskGITPrior(TokenLayout(Label(classes), codes, side, side), options)


def convert(arrays: Arrays, prior: MaskGITPrior) -> PyTree:
    """Renames and joins the arrays of a transformer.

    Args:
      arrays: arrays by their original names.
      prior: as from `prior_of`.

    Returns:
      Parameters of the prior, float32 numpy arrays.

    Raises:
      PretrainedError: arrays are missing, unexpected, of another shape, or damaged.
    """
    check(arrays)
    get = lambda name: state_dict.as_float32(name, arrays[name])
    words, positions, codes = get(_WORDS), get(_POSITIONS), prior.layout.image_vocab
    found = {
        ("embedding", "image"): words[:codes],
        ("embedding", "text"): words[codes:],  # the classes, and the mask as padding
        ("embedding", "mask"): words[-1:],
        ("embedding", "text_positions"): positions[:1],
        ("embedding", "cells"): positions[1:],
        ("image_bias",): get("MlmLayer_0/mlm_bias/bias")[:codes],
    }
    pairs = {("embedding", "norm", "norm"): "Embed_0/embeddings_ln", ("head_norm", "norm"): "MlmLayer_0/mlm_ln"}
    dense = {("head",): "MlmLayer_0/mlm_dense"}
    for layer in range(prior.options.trunk.depth):
        ours, theirs = ("trunk", f"layer_{layer}"), f"TransformerLayer_{layer}"
        attention = f"{theirs}/Attention_0/self_attention"
        for leaf, axis in (("kernel", 1), ("bias", 0)):
            each = [get(f"{attention}/{part}/{leaf}") for part in ("query", "key", "value")]
            found[(*ours, "attention", "qkv", leaf)] = np.stack(each, axis)
        pairs[(*ours, "attention_norm", "norm")] = f"{theirs}/Attention_0/attention_output_ln"
        pairs[(*ours, "mlp_norm", "norm")] = f"{theirs}/Mlp_0/layer_output_ln"
        dense[(*ours, "attention", "out")] = f"{attention}/out"
        dense[(*ours, "mlp", "up")] = f"{theirs}/Mlp_0/intermediate_output"
        dense[(*ours, "mlp", "down")] = f"{theirs}/Mlp_0/layer_output"
    found |= {(*ours, leaf): get(f"{name}/{leaf}") for ours, name in pairs.items() for leaf in ("scale", "bias")}
    found |= {(*ours, leaf): get(f"{name}/{leaf}") for ours, name in dense.items() for leaf in ("kernel", "bias")}
    return state_dict.as_parameters(found, prior.init, prior.options)


# -- files --------------------------------------------------------------------------------------------------------


def _run(name: str, files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports the two files, in any order; see `Importer.run`."""
    prior_run.check_free(output)
    transformer, tokenizer = files
    arrays, image_arrays = state_dict.read(transformer), state_dict.read(tokenizer)
    if "quantizer/codebook" in arrays:
        transformer, tokenizer, arrays, image_arrays = tokenizer, transformer, image_arrays, arrays
    side, steps = PUBLISHED[name]
    try:
        sizes = check(arrays)
        if sizes.by_letter["S"] != side**2 + 1:
            raise PretrainedError(f"{_POSITIONS} has {sizes.by_letter['S']} rows; {name} has {side**2 + 1}.")
    except PretrainedError as error:
        raise PretrainedError(f"{transformer}: {error}") from error
    try:
        options = maskgit_tokenizer.options_of(image_arrays)
        image_tokenizer = VQGANTokenizer(dataclasses.replace(options, image_size=side * options.downsample))
        image_params = maskgit_tokenizer.convert(image_arrays, options)
    except PretrainedError as error:
        raise PretrainedError(f"{tokenizer}: {error}") from error
    prior = prior_of(sizes, options.vocab_size, steps, settings["dtype"])
    names, classes = settings["names"], prior.layout.condition.vocab
    labels = Labels.load(names, classes, "--names") if names else Labels(classes)
    prior_run.save(output, name, prior, convert(arrays, prior), image_tokenizer, image_params, labels)
    return f"{classes:,} classes, {image_tokenizer.image_size} pixels, {prior_run.described(prior)}"


def _claims(name: str, arrays: Arrays) -> bool:
    try:
        if "quantizer/codebook" in arrays:
            return bool(maskgit_tokenizer.convert(arrays, maskgit_tokenizer.options_of(arrays)))
        return check(arrays).by_letter["S"] == PUBLISHED[name][0] ** 2 + 1
    except PretrainedError:
        return False


def _importer(name: str, parameters: int) -> Importer:
    size = name.removeprefix("maskgit-imagenet")
    return Importer(
        name=name,
        title=f"MaskGIT of ImageNet, {size} x {size} pixels, 1,000 classes, with its image tokenizer",
        parameters=parameters,
        licence="Apache-2.0",
        source="github.com/google-research/maskgit (storage.googleapis.com/maskgit-public/checkpoints)",
        files=(f"maskgit_imagenet{size}_checkpoint", f"tokenizer_imagenet{size}_checkpoint"),
        use="--config.model_workdir",
        run=functools.partial(_run, name),
        claims=functools.partial(_claims, name),
        settings=(
            Setting("names", str, "Text file with the name of a class in each line, class 0 first."),
            Setting("dtype", str, prior_run.DTYPE_HELP, "float32", choices=prior_run.DTYPES),
        ),
    )


IMPORTERS = (_importer("maskgit-imagenet256", 226_972_780), _importer("maskgit-imagenet512", 227_562_604))
