"""The part that image tokenizers with one linen network have in common.

h, w grid, H = downsample * h
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Key

from dalle_jax.pytree import PyTree


@runtime_checkable
class Sizes(Protocol):
    """The fields and methods of a network's options that every tokenizer has."""

    vocab_size: int
    image_size: int

    @property
    def downsample(self) -> int: ...

    def grid(self, image_size: int) -> tuple[int, int]: ...


@dataclasses.dataclass(frozen=True)
class NetworkTokenizer:
    """Base of an `ImageTokenizer` whose sizes are the options of its network.

    Tokenizers with equal options are equal, so that `jax.jit` with a static tokenizer compiles once for all of them.

    Attributes:
      options: sizes.
    """

    options: Sizes
    network: ClassVar[Any]  # maps options to the linen module

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.network(self.options)

    @property
    def vocab_size(self) -> int:
        """V, the number of codes."""
        return self.options.vocab_size

    @property
    def downsample(self) -> int:
        """Side of the square of pixels that one token stands for."""
        return self.options.downsample

    @property
    def image_size(self) -> int:
        """Side of the images that the tokenizer was trained on."""
        return self.options.image_size

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns the number of rows and columns of tokens of a square image.

        Raises:
          ConfigError: the image size is not a multiple of `downsample`.
        """
        return self.options.grid(image_size)

    def init(self, key: Key[Array, ""]) -> PyTree:
        """Returns new parameters, boxed with their logical axis names."""
        side = self.downsample
        return self.module.init(key, jnp.zeros((1, side, side, 3)))["params"]
