"""The layout of ru-DALL-E's transformer: names and shapes of its arrays, and their conversion for our prior.

Matrices of the original are [out, in].

    text_embeddings, text_pos_embeddings        the text vocabulary, and then one padding id for each position
    image_embeddings, image_row_embeddings, image_col_embeddings
    transformer.layers.0.{input_layernorm,before_first_addition_layernorm}
    transformer.layers.0.{post_attention_layernorm,before_second_addition_layernorm}
    transformer.layers.0.attention.{query_key_value,dense}, transformer.layers.0.mlp.{dense_h_to_4h,dense_4h_to_h}
    transformer.final_layernorm, to_logits.0 (a norm), to_logits.1 (classes of text and image)

Two operations of the original only serve float16, and are left out. PB-relax changes no result, and outputs of
attention are cut at 65,504. In v3 training, the original predicts the first image token with the text classes. Drawing
reads the image classes there, as here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from dalle_jax.errors import PretrainedError
from dalle_jax.models.attention.patterns import Convolutional, Toroidal
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.pretrained import state_dict
from dalle_jax.priors.autoregressive import AutoregressivePrior
from dalle_jax.priors.autoregressive_model import AutoregressiveOptions
from dalle_jax.priors.condition import Text
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout

Arrays = Mapping[str, np.ndarray]

VERSIONS = ("v2", "v3")
_KERNEL = 11
_BEGIN = 2  # id of begin, which v2 writes before the text
_MAX_DEPTH = 1000
_MASKS = re.compile(r"transformer\.(row|col|conv)_mask")  # buffers that some files hold
CONV_MASK = "transformer.conv_mask"
_SHAPES = {  # D width, W text ids, V image vocabulary, P text positions of v2, G side of the grid, L all classes
    "text_embeddings.weight": "WD",
    "text_pos_embeddings.weight": "PD",
    "image_embeddings.weight": "VD",
    "image_row_embeddings.weight": "GD",
    "image_col_embeddings.weight": "GD",
    "to_logits.1.weight": "LD",
    "to_logits.1.bias": "L",
}
_NORMS = {"to_logits.0": ("trunk", "second_final_norm"), "transformer.final_layernorm": ("trunk", "final_norm")}
_NORMS_OF_LAYER = {
    "input_layernorm": "attention_norm",
    "before_first_addition_layernorm": "attention_out_norm",
    "post_attention_layernorm": "mlp_norm",
    "before_second_addition_layernorm": "mlp_out_norm",
}
_DENSE_OF_LAYER = {  # Q queries, keys and values, F hidden
    "attention.query_key_value": ("QD", ("attention", "qkv")),
    "attention.dense": ("DD", ("attention", "out")),
    "mlp.dense_h_to_4h": ("FD", ("mlp", "up")),
    "mlp.dense_4h_to_h": ("DF", ("mlp", "down")),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a transformer.

    Attributes:
      depth: number of layers.
      width: D.
      text_ids: W.
      text_length: T, without the position of begin.
      image_vocab: V.
      side: G.
      hidden: F.
    """

    depth: int
    width: int
    text_ids: int = 16_384 + 128
    text_length: int = 128
    image_vocab: int = 8192
    side: int = 32
    hidden: int = 0

    def __post_init__(self):
        object.__setattr__(self, "hidden", self.hidden or 4 * self.width)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each array by its original name."""
        d, classes = self.width, self.text_ids + self.image_vocab
        sizes = {"D": d, "W": self.text_ids, "P": self.text_length + 1, "V": self.image_vocab, "G": self.side}
        sizes |= {"L": classes, "Q": 3 * d, "F": self.hidden}
        letters, norms = dict(_SHAPES), list(_NORMS)
        for layer in map(_layer, range(self.depth)):
            norms += [f"{layer}.{name}" for name in _NORMS_OF_LAYER]
            for name, (of_kernel, _) in _DENSE_OF_LAYER.items():
                letters |= {f"{layer}.{name}.weight": of_kernel, f"{layer}.{name}.bias": of_kernel[0]}
        letters |= {f"{name}.{leaf}": "D" for name in norms for leaf in ("weight", "bias")}
        return {name: tuple(sizes[letter] for letter in shape) for name, shape in letters.items()}


def _layer(number: int) -> str:
    return f"transformer.layers.{number}"


def sizes_of(arrays: Arrays) -> Sizes:
    """Derives the sizes of a transformer from its arrays.

    Raises:
      PretrainedError: the arrays are not those of such a model.
    """
    layers = {int(found[1]) for name in arrays if (found := re.match(r"transformer\.layers\.(\d{1,4})\.", name))}
    rows = {name: f"{name}_embeddings.weight" for name in ("text", "text_pos", "image", "image_row")}
    try:
        (ids, width), (positions, _), (codes, _), (side, _) = (arrays[name].shape for name in rows.values())
        hidden, _ = arrays[f"{_layer(0)}.mlp.dense_h_to_4h.weight"].shape
        if not 1 <= max(layers) + 1 <= _MAX_DEPTH or min(ids, positions - 1, width, hidden) < 1 or ids < positions:
            raise ValueError(f"{max(layers) + 1} layers, {ids} text ids and {positions} text positions")
        return Sizes(max(layers) + 1, width, ids, positions - 1, codes, side, hidden)
    except (KeyError, ValueError) as error:
        raise PretrainedError(
            f"These are not the weights of ru-DALL-E's transformer: {error} (expected 'text_embeddings.weight', "
            "'image_row_embeddings.weight', 'transformer.layers.0.mlp.dense_h_to_4h.weight' and the like)."
        ) from error


def check(arrays: Arrays, sizes: Sizes) -> None:
    """Raises a `PretrainedError` unless the arrays, without the masks, have these names and shapes."""
    state_dict.check_shapes({name: x for name, x in arrays.items() if not _MASKS.fullmatch(name)}, sizes.shapes())


def version_of(arrays: Arrays, sizes: Sizes) -> str | None:
    """Returns the version by the convolutional mask in a file, or None if it holds none.

    Raises:
      PretrainedError: the mask is that of neither version.
    """
    if CONV_MASK not in arrays:
        return None
    layout, found = _token_layout(sizes), np.asarray(arrays[CONV_MASK]) > 0
    for version, pattern in (("v2", Toroidal(_KERNEL)), ("v3", Convolutional(_KERNEL, wrap=False))):
        if np.array_equal(found, pattern.mask(layout)):
            return version
    raise PretrainedError(f"{CONV_MASK} is the mask of no known version of ru-DALL-E.")


def _token_layout(sizes: Sizes) -> TokenLayout:
    t, side = sizes.text_length, sizes.side
    return TokenLayout(Text(sizes.text_ids - t, t), sizes.image_vocab, side, side)


def prior_of(sizes: Sizes, heads: int, version: str, dtype: str = "float32") -> AutoregressivePrior:
    """Builds the prior of a transformer.

    Args:
      sizes: of the transformer.
      heads: number of heads.
      version: one of `VERSIONS`.
      dtype: of products and activations. The residual stream is float32.
    """
    trunk = TransformerOptions(
        width=sizes.width, depth=sizes.depth, heads=heads, mlp_ratio=sizes.hidden / sizes.width,
        norm_placement="sandwich", final_norms=2, activation="gelu_tanh", qkv_bias=True, dropout=0.1,
        attention_dropout=0.1, dtype=dtype, float32_residual=True, scan=False,
    )  # fmt: skip
    options = AutoregressiveOptions(
        trunk=trunk, kernel=_KERNEL, wrap=False, torus=version == "v2", shifted=version == "v2", head_bias=True,
        padding_classes=True, caption_drop=0.0,
    )  # fmt: skip
    return AutoregressivePrior(_token_layout(sizes), options)


def convert(arrays: dict[str, np.ndarray], sizes: Sizes, prior: AutoregressivePrior) -> PyTree:
    """Renames, splits and transposes the arrays of a transformer.

    Args:
      arrays: arrays by their original names. They are removed one by one, so that memory never holds two copies of all.
      sizes: of the transformer.
      prior: as from `prior_of`.

    Returns:
      Parameters of the prior. Kernels keep the dtype of the file, if that has two bytes. All others are float32.

    Raises:
      PretrainedError: arrays are missing, unexpected, of another shape, or damaged.
    """
    check(arrays, sizes)
    take = lambda name: state_dict.as_float32(name, arrays.pop(name))

    def kernel(name: str) -> np.ndarray:
        array = arrays.pop(name)
        checked = state_dict.as_float32(name, array)
        return array if array.dtype.itemsize == 2 else checked

    text, positions = take("text_embeddings.weight"), take("text_pos_embeddings.weight")
    heads, biases = kernel("to_logits.1.weight"), take("to_logits.1.bias")
    found = {
        "text": text,
        "text_positions": positions[:-1],
        "image": take("image_embeddings.weight"),
        "rows": take("image_row_embeddings.weight"),
        "columns": take("image_col_embeddings.weight"),
        "text_head_kernel": heads[: len(text)],
        "image_head_kernel": heads[len(text) :],
        "text_head_bias": biases[: len(text)],
        "image_head_bias": biases[len(text) :],
    }
    if prior.options.shifted:
        found |= {"start_of_text": text[_BEGIN : _BEGIN + 1] + positions[:1], "text_positions": positions[1:]}
    found = {("embedding", name): array for name, array in found.items()}
    norms, trunk = dict(_NORMS), prior.options.trunk
    for number in range(sizes.depth):
        theirs, ours = _layer(number), ("trunk", f"layer_{number}")
        norms |= {f"{theirs}.{name}": (*ours, norm) for name, norm in _NORMS_OF_LAYER.items()}
        for name, (_, place) in _DENSE_OF_LAYER.items():
            matrix, bias = kernel(f"{theirs}.{name}.weight").T, take(f"{theirs}.{name}.bias")
            by_head = (trunk.heads, trunk.size_per_head)
            if place[-1] == "qkv":
                matrix, bias = matrix.reshape(-1, 3, *by_head), bias.reshape(3, *by_head)
            if place[-1] == "out":
                matrix = matrix.reshape(*by_head, -1)
            found |= {(*ours, *place, "kernel"): np.ascontiguousarray(matrix), (*ours, *place, "bias"): bias}
    for name, place in norms.items():
        found |= {(*place, "norm", "scale"): take(f"{name}.weight"), (*place, "norm", "bias"): take(f"{name}.bias")}
    return state_dict.as_parameters(found, prior.init, prior.options)
