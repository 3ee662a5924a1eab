"""The `ImageTokenizer` protocol, and the stored descriptions of image tokenizers.

B batch    H, W image    h, w grid    V vocabulary    E codebook width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from jaxtyping import Array, ArrayLike, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from dalle_jax.configuration.options import from_config
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.image_tokenizers.flops import Flops
from dalle_jax.image_tokenizers.vq import VQOptions, VQTokenizer
from dalle_jax.image_tokenizers.vqgan import VQGANOptions, VQGANTokenizer
from dalle_jax.pytree import PyTree

# kind → the tokenizer and its options
_KINDS = {
    DVAETokenizer.kind: (DVAETokenizer, DVAEOptions),
    VQTokenizer.kind: (VQTokenizer, VQOptions),
    VQGANTokenizer.kind: (VQGANTokenizer, VQGANOptions),
}
TASKS = tuple(_KINDS)  # the trainings of image tokenizers: `config.task` is the kind


@runtime_checkable
class ImageTokenizer(Protocol):
    """Encodes images to a grid of tokens, and decodes tokens.

    Implementations are frozen dataclasses. Equal ones share compiled programs, as static arguments of `jax.jit`.

    Attributes:
      kind: name of the class in stored descriptions.
      options: frozen dataclass of hyper-parameters.
      vocab_size: V, the number of tokens.
      downsample: side of the square of pixels that one token stands for.
      image_size: side of the training images in pixels.
    """

    kind: str
    options: object
    vocab_size: int
    downsample: int
    image_size: int

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns the number of rows and columns of tokens of a square image.

        Raises:
          ConfigError: the image size is not a multiple of `downsample`.
        """

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Returns new parameters, boxed with their logical axis names."""

    def encode(self, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]) -> Int[Array, "B h w"]:
        """Encodes images, uint8 [B, H, W, 3], to tokens, int32 [B, h, w]."""

    def decode(self, params: PyTree, tokens: Int[ArrayLike, "B h w"]) -> Float[Array, "B H W 3"]:
        """Decodes tokens, int32 [B, h, w], to images, float32 [B, H, W, 3] in [0, 1]."""

    def codebook(self, params: PyTree) -> Float[ArrayLike, "V E"]:
        """Returns a vector for each token, float32 [V, E]. Tokens that decode to similar pixels have close vectors."""

    def flops(self, image_size: int) -> Flops:
        """Counts the operations for one image of `image_size` pixels a side."""


def to_dict(tokenizer: ImageTokenizer) -> dict[str, Any]:
    """Returns a JSON description of a tokenizer without parameters; `from_dict` is the inverse."""
    return {"kind": tokenizer.kind, **dataclasses.asdict(tokenizer.options)}


def from_dict(description: Mapping[str, Any]) -> ImageTokenizer:
    """The tokenizer of a description made by `to_dict`.

    Raises:
      ConfigError: a kind or an option that this version does not know.
    """
    fields = dict(description)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"Image tokenizer of kind {kind!r}: expected one of {sorted(_KINDS)}.")
    tokenizer, options = _KINDS[kind]
    return tokenizer(from_config(options, fields, "", "options.json"))


def own_params(tokenizer: ImageTokenizer, params: PyTree) -> PyTree:
    """Returns a tokenizer's own parameters among those of its training, which may hold a discriminator as well."""
    return {name: params[name] for name in jax.eval_shape(tokenizer.init, jax.random.key(0))}


def of_training(config: Mapping[str, Any] | ConfigDict) -> ImageTokenizer:
    """Returns the tokenizer that a training configuration describes: `model`, for images of `data.image_size`.

    Args:
      config: the configuration, or what was read back from a workdir's config.json. `task` is the tokenizer's kind.

    Raises:
      ConfigError: an option that does not exist, or sizes that do not fit each other.
    """
    model = {**dict(config["model"]), "image_size": config["data"]["image_size"]}
    if config["task"] not in _KINDS:
        raise ConfigError(f"config.task is {config['task']!r}: expected the training of an image tokenizer, {TASKS}.")
    tokenizer, options = _KINDS[config["task"]]
    return tokenizer(from_config(options, model, "model"))
