"""The layout of DALL-E mini's encoder and decoder in min-dalle: names and shapes of arrays, and their conversion.

Matrices of the original are [out, in], and no product has a bias.

    encoder:  embed_tokens, embed_positions, layernorm_embedding, final_ln, and in each layer
              layers.0.{pre_self_attn_layer_norm,self_attn.{q,k,v,out}_proj,self_attn_layer_norm}, layers.0.glu
    decoder:  the same with lm_head, and in each layer
              layers.0.{pre_encoder_attn_layer_norm,encoder_attn.{q,k,v,out}_proj,encoder_attn_layer_norm}
    glu:      ln0, fc0 (activated), fc1 (its gate), ln1 (of their product), fc2

The norms before products have no gains in DALL-E mini (`force_ln_scale` is false), and neither have the final norms.
The published files lack these arrays, which min-dalle then fills with ones, and so does `convert`.

The stream of the original is start, code 1, …, code N - 1, with the positions 0 to N - 1. Our start-of-image vector is
the sum of the embedding of start and position 0, and the image token j has position j + 1. The last image token is
embedded but predicts nothing, so that its position is zeros.

The padding of captions is hidden from attention. The original's null text is begin, end, padding. Our empty caption is
padding everywhere, and `encoder_padding` is 2, so that the padding of the first two positions is read: it has the
embeddings of begin and end. Captions have at least these two ids, and never show that padding.

Rows of the tables and the head past the codes of the image tokenizer are left out. Drawing never reads them, except
for that of start.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from dalle_jax.errors import PretrainedError
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.pretrained import state_dict
from dalle_jax.priors.autoregressive import AutoregressivePrior
from dalle_jax.priors.autoregressive_model import AutoregressiveOptions
from dalle_jax.priors.condition import Text
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout

Arrays = Mapping[str, np.ndarray]

SIDES = ("encoder", "decoder")
_MAX_DEPTH = 1000
_SHAPES = {  # D width, W text ids, T text positions, R rows of the image tables, N image tokens
    "encoder": {"embed_tokens.weight": "WD", "embed_positions.weight": "TD"},
    "decoder": {"embed_tokens.weight": "RD", "embed_positions.weight": "ND", "lm_head.weight": "RD"},
}
_MATRICES_OF_GLU = {"glu.fc0": ("FD", "up"), "glu.fc1": ("FD", "gate"), "glu.fc2": ("DF", "down")}  # F hidden
_ATTENTIONS = {"encoder": {"self_attn": "attention"}}  # original name → ours
_ATTENTIONS["decoder"] = _ATTENTIONS["encoder"] | {"encoder_attn": "cross"}
_NORMS_OF_GLU = {"glu.ln0": ("D", ("mlp_norm",)), "glu.ln1": ("F", ("mlp", "hidden_norm"))}
# Norms whose gains may be missing: those right before products.
WITHOUT_GAIN = re.compile(r"(?:layers\.\d+\.(pre_(?:self|encoder)_attn_layer_norm|glu\.ln[01])|(final_ln))\.weight")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Attributes:
      depth: number of layers of the encoder, and of the decoder.
      width: D.
      heads: number of attention heads.
      hidden: F.
      text_ids: W.
      image_rows: R, codes and special ids.
      codes: number of codes of the image tokenizer; they are the first of the R.
      text_length: T.
      side: of the grid of N image tokens.
    """

    depth: int
    width: int
    heads: int
    hidden: int
    text_ids: int
    image_rows: int
    codes: int = 2**14
    text_length: int = 64
    side: int = 16

    def shapes(self, side: str) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array of "encoder" or "decoder" by its original name."""
        sizes = {"D": self.width, "F": self.hidden, "W": self.text_ids, "T": self.text_length}
        sizes |= {"R": self.image_rows, "N": self.side**2}
        letters, norms = dict(_SHAPES[side]), {name: "D" for name in ("layernorm_embedding", "final_ln")}
        for layer in map(_layer, range(self.depth)):
            norms |= {f"{layer}.{name}": letter for name, (letter, _) in _norms_of_layer(side).items()}
            letters |= {f"{layer}.{name}.weight": of_kernel for name, (of_kernel, _) in _MATRICES_OF_GLU.items()}
            letters |= {f"{layer}.{attn}.{part}_proj.weight": "DD" for attn in _ATTENTIONS[side] for part in _PARTS}
        letters |= {f"{name}.{leaf}": letter for name, letter in norms.items() for leaf in ("weight", "bias")}
        return {name: tuple(sizes[letter] for letter in shape) for name, shape in letters.items()}


_PARTS = ("q", "k", "v", "out")


def _layer(number: int) -> str:
    return f"layers.{number}"


def _norms_of_layer(side: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Returns size and place of each norm of a layer by its original name."""
    found = dict(_NORMS_OF_GLU)
    for theirs, ours in _ATTENTIONS[side].items():
        found |= {
            f"pre_{theirs}_layer_norm": ("D", (f"{ours}_norm",)),
            f"{theirs}_layer_norm": ("D", (f"{ours}_out_norm",)),
        }
    return found


def side_of(arrays: Arrays) -> str | None:
    """Returns "encoder" or "decoder", or None for the arrays of another model."""
    if not {"layers.0.glu.fc0.weight", "layernorm_embedding.bias", "embed_positions.weight"} <= arrays.keys():
        return None
    return "decoder" if "lm_head.weight" in arrays else "encoder"


def with_gains(arrays: Arrays, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Adds gains of one to the norms that have none, if no norm of that kind has one."""
    kind = lambda name: (found := WITHOUT_GAIN.fullmatch(name)) and (found[1] or found[2])
    present = {kind(name) for name in arrays}
    missing = {name: np.ones(shape, np.float32) for name, shape in shapes.items() if name not in arrays and kind(name)}
    return {**arrays, **{name: gain for name, gain in missing.items() if kind(name) not in present}}


def check(arrays: Arrays, side: str, sizes: Sizes) -> None:
    """Checks names and shapes.

    Args:
      arrays: arrays by their original names.
      side: "encoder" or "decoder", which they must be.
      sizes: of the model.

    Raises:
      PretrainedError: they are those of another model, or arrays are missing, unexpected or of another shape.
    """
    found = side_of(arrays)
    if found != side:
        what = "another model" if found is None else f"the {found}"
        raise PretrainedError(
            f"These are the weights of {what}; expected the {side} of DALL-E mini in the layout of min-dalle "
            "('layers.0.glu.fc0.weight', 'embed_positions.weight', and 'lm_head.weight' in the decoder alone)."
        )
    shapes = sizes.shapes(side)
    state_dict.check_shapes(with_gains(arrays, shapes), shapes)


def prior_of(sizes: Sizes, dtype: str = "float32") -> AutoregressivePrior:
    """Builds the prior of a model.

    Args:
      sizes: of the model.
      dtype: of products and activations.
    """
    ratio = sizes.hidden / sizes.width
    if int(sizes.width * ratio) < sizes.hidden:
        ratio = math.nextafter(ratio, math.inf)
    trunk = TransformerOptions(
        width=sizes.width, depth=sizes.depth, heads=sizes.heads, mlp_ratio=ratio, norm_placement="normformer",
        embedding_norm=True, activation="geglu", positions="table", dtype=dtype, scan=False,
    )  # fmt: skip
    options = AutoregressiveOptions(trunk=trunk, attention="full", encoder_depth=sizes.depth, encoder_padding=2)
    layout = TokenLayout(Text(sizes.text_ids, sizes.text_length), sizes.codes, sizes.side, sizes.side)
    return AutoregressivePrior(layout, options)


def convert(
    encoder: dict[str, np.ndarray],
    decoder: dict[str, np.ndarray],
    sizes: Sizes,
    prior: AutoregressivePrior,
    *,
    start_id: int,
    begin_id: int,
    end_id: int,
) -> PyTree:
    """Renames, joins and transposes the arrays of both sides.

    Args:
      encoder: arrays by their original names. They are removed one by one, so that memory never holds two copies of
        all.
      decoder: likewise.
      sizes: of the model.
      prior: as from `prior_of`.
      start_id: row of the image table that is the start of the image, in [0, R).
      begin_id: text id before each caption.
      end_id: text id after each caption.

    Returns:
      Parameters of the prior. Kernels keep the dtype of the file, if that has two bytes. All others are float32.

    Raises:
      PretrainedError: arrays are missing, unexpected, of another shape, or damaged, or there is no such row.
    """
    files = {"encoder": encoder, "decoder": decoder}
    for side, arrays in files.items():
        check(arrays, side, sizes)
        arrays |= with_gains(arrays, sizes.shapes(side))
    if not 0 <= start_id < sizes.image_rows:
        raise PretrainedError(
            f"--start_id={start_id} is no row of the image table; expected 0 to {sizes.image_rows - 1}."
        )
    found = _embedding(encoder, decoder, sizes, start_id, (begin_id, end_id))
    for side, trunk in (("encoder", "encoder"), ("decoder", "trunk")):
        found |= _trunk(files[side], side, trunk, prior.options.trunk)
    return state_dict.as_parameters(found, prior.init, prior.options)


def _take(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Removes an array, and returns it in float32."""
    return state_dict.as_float32(name, arrays.pop(name))


def _kernel(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Removes a matrix, and returns it in its dtype if that has two bytes, and otherwise in float32."""
    array = arrays.pop(name)
    checked = state_dict.as_float32(name, array)
    return array if array.dtype.itemsize == 2 else checked


def _norm(arrays: dict[str, np.ndarray], name: str, *place: str) -> dict[tuple[str, ...], np.ndarray]:
    leaves = {"scale": "weight", "bias": "bias"}
    return {(*place, "norm", ours): _take(arrays, f"{name}.{theirs}") for ours, theirs in leaves.items()}


def _embedding(encoder, decoder, sizes: Sizes, start_id: int, visible: tuple[int, int]):
    """Converts the tables, the head and the norms of the embeddings."""
    words, tokens = _take(encoder, "embed_tokens.weight"), _take(decoder, "embed_tokens.weight")
    positions = _take(decoder, "embed_positions.weight")
    padding = np.zeros((sizes.text_length, sizes.width), np.float32)
    padding[: len(visible)] = words[list(visible)]
    tables = {
        "text": np.concatenate([words, padding]),
        "text_positions": _take(encoder, "embed_positions.weight"),
        "start_of_image": tokens[start_id : start_id + 1] + positions[:1],
        "image": tokens[: sizes.codes],
        "cells": np.concatenate([positions[1:], np.zeros((1, sizes.width), np.float32)]),
        "image_head_kernel": _kernel(decoder, "lm_head.weight")[: sizes.codes],
    }
    found = {("embedding", name): table for name, table in tables.items()}
    found |= _norm(encoder, "layernorm_embedding", "embedding", "text_norm")
    return found | _norm(decoder, "layernorm_embedding", "embedding", "norm")


def _trunk(arrays: dict[str, np.ndarray], side: str, trunk: str, options: TransformerOptions):
    """Converts the layers and the final norm of one side."""
    width, heads = options.width, (options.heads, options.size_per_head)
    found = _norm(arrays, "final_ln", trunk, "final_norm")
    zeros = lambda size: np.zeros(size, np.float32)  # of biases, which the original does not have
    for number in range(options.depth):
        theirs, ours = _layer(number), (trunk, f"layer_{number}")
        for name, (_, place) in _norms_of_layer(side).items():
            found |= _norm(arrays, f"{theirs}.{name}", *ours, *place)
        for name, kind in _ATTENTIONS[side].items():
            q, k, v, out = (_kernel(arrays, f"{theirs}.{name}.{part}_proj.weight").T for part in _PARTS)
            q, k, v = (part.reshape(width, *heads) for part in (q, k, v))
            if kind == "cross":
                place = (*ours, "cross_attention")
                found |= {(*place, "q", "kernel"): np.ascontiguousarray(q)}
                found |= {(*place, "kv", "kernel"): np.stack([k, v], axis=1)}
            else:
                place = (*ours, "attention")
                found |= {(*place, "qkv", "kernel"): np.stack([q, k, v], axis=1)}
            found |= {(*place, "out", "kernel"): np.ascontiguousarray(out).reshape(*heads, width)}
            found |= {(*place, "out", "bias"): zeros(width)}
        for name, (_, part) in _MATRICES_OF_GLU.items():
            kernel = np.ascontiguousarray(_kernel(arrays, f"{theirs}.{name}.weight").T)
            found |= {(*ours, "mlp", part, "kernel"): kernel, (*ours, "mlp", part, "bias"): zeros(kernel.shape[1])}
    return found
