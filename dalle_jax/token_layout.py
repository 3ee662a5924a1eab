"""The token stream of one picture and its caption: who sits where, with which id.

Section 2.2 of Zero-Shot Text-to-Image Generation: T text positions are followed by N = h·w image positions in
raster order. A text position without a token holds a padding id *of its own*: padding is embedded and attended
to, never masked. Everything that needs an offset, a length or a special id asks this class.

    T text length    h, w grid    N = h·w image tokens    S = T + N
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Vocabularies and positions of the stream "text, then image".

    Attributes:
      text_vocab: number of kinds of text token, without padding.
      image_vocab: number of kinds of image token.
      text_length: T, text positions, padding included.
      height: h, rows of the image token grid.
      width: w, columns of the image token grid.

    Raises:
      ValueError: where one of them is not positive.
    """

    text_vocab: int
    image_vocab: int
    text_length: int
    height: int
    width: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < 1:
                raise ValueError(f"TokenLayout.{field.name} is {value}; it must be at least 1.")

    @property
    def image_length(self) -> int:
        """N = h·w."""
        return self.height * self.width

    @property
    def length(self) -> int:
        """S = T + N."""
        return self.text_length + self.image_length

    @property
    def text_ids(self) -> int:
        """Rows of the text embedding: the text vocabulary and one padding id for each text position."""
        return self.text_vocab + self.text_length

    @property
    def mask_id(self) -> int:
        """The id after the image vocabulary, which stands for "not yet decided" in a bidirectional prior."""
        return self.image_vocab

    def pad_text(self, ids: Sequence[int]) -> np.ndarray:
        """Fills the positions after `ids` with their padding ids.

        Args:
          ids: at most T ids in [0, text_vocab).

        Returns:
          int32 [T], ids in [0, text_ids).

        Raises:
          ValueError: where there are more than T ids, or one lies outside the vocabulary.
        """
        ids = np.asarray(ids, np.int32).reshape(-1)
        if len(ids) > self.text_length:
            raise ValueError(f"{len(ids)} text tokens do not fit in {self.text_length} positions: truncate first.")
        if len(ids) and not (0 <= ids.min() and ids.max() < self.text_vocab):
            raise ValueError(
                f"Text ids from {ids.min()} to {ids.max()} lie outside the vocabulary of {self.text_vocab}: "
                "was the text encoded with another text model than the one this prior was built for?"
            )
        padded = self.null_text()
        padded[: len(ids)] = ids
        return padded

    def null_text(self) -> np.ndarray:
        """The empty caption, int32 [T]: padding everywhere. It stands for "no text" in guidance."""
        return self.text_vocab + np.arange(self.text_length, dtype=np.int32)

    def text_targets(self, text: jnp.ndarray) -> jnp.ndarray:
        """Classes for the text head, int32 [..., T] in [0, text_vocab].

        At a given position only one padding id is possible, so all of them share the class `text_vocab`.
        """
        return jnp.minimum(text, self.text_vocab)
