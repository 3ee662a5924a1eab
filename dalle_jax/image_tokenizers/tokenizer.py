"""What an image tokenizer is, and how one is written beside the prior that was trained on its tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from dalle_jax.configuration.options import from_config as options_from_config
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.pytree import PyTree

_KINDS = {DVAETokenizer.kind: (DVAETokenizer, DVAEOptions)}


class ImageTokenizer(Protocol):
    """Pictures to a grid of tokens and back.

    Attributes:
      kind: names the class in saved descriptions.
      options: frozen dataclass of its sizes.
      vocab_size: V, number of kinds of token.
      downsample: side of the square of pixels that one token stands for.
      image_size: side of the pictures it was trained on.
    """

    kind: str
    options: Any
    vocab_size: int
    downsample: int
    image_size: int

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of tokens of a square picture; ConfigError where they are not whole."""

    def init(self, key: jax.Array) -> PyTree:
        """Fresh parameters, boxed with their logical names."""

    def encode(self, params: PyTree, images: jax.Array) -> jax.Array:
        """uint8 [B, H, W, 3] to int32 [B, h, w]."""

    def decode(self, params: PyTree, tokens: jax.Array) -> jax.Array:
        """int32 [B, h, w] to float32 [B, H, W, 3] in [0, 1]."""

    def codebook(self, params: PyTree) -> jax.Array:
        """A vector for each token, near where tokens decode alike: float32 [V, C]."""


def to_dict(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """A description that JSON can hold, from which `from_dict` makes the same tokenizer (without parameters)."""
    return {"kind": tokenizer.kind, **dataclasses.asdict(tokenizer.options)}


def from_dict(description: Mapping[str, Any]) -> ImageTokenizer:
    """The tokenizer of a description made by `to_dict`.

    Raises:
      ConfigError: a kind or an option that this version does not know.
    """
    fields = dict(description)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ConfigError(f"Image tokenizer of kind {kind!r}: expected one of {sorted(_KINDS)}.")
    tokenizer, options = _KINDS[kind]
    return tokenizer(options_from_config(options, fields, "image_tokenizer"))


def from_config(config: Mapping[str, Any]) -> ImageTokenizer:
    """The tokenizer that a dVAE training configuration describes: its `model`, for pictures of `data.image_size`.

    Args:
      config: the configuration, or what was read back from a workdir's config.json.

    Raises:
      ConfigError: an option that does not exist, or sizes that do not fit each other.
    """
    model = {**dict(config["model"]), "image_size": config["data"]["image_size"]}
    return DVAETokenizer(options_from_config(DVAEOptions, model, "model"))
