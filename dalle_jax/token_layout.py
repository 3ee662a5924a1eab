"""The layout of the token stream of a caption and its image: positions, vocabularies and special ids.

T text positions are followed by N = h·w image positions in raster order (DALL-E, section 2.2). Each text position has
its own padding id. Padding is embedded and attended to; it is never masked. All offsets, lengths and special ids in the
package come from this class.

    T text length    h, w grid    N = h·w image tokens    S = T + N
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

LONGEST_STREAM = 2**15  # positions: a mask of attention over more of them fills the memory of a host
LARGEST_VOCABULARY = 2**24


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Sizes and special ids of the stream "text, then image".

    Attributes:
      text_vocab: number of kinds of text token, without padding.
      image_vocab: number of kinds of image token.
      text_length: T, text positions, padding included.
      height: h, rows of the image token grid.
      width: w, columns of the image token grid.

    Raises:
      ValueError: a size below 1, or more than `LONGEST_STREAM` positions.
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
        if self.length > LONGEST_STREAM:
            raise ValueError(
                f"A stream of {self.text_length} text positions and {self.height} x {self.width} image positions is "
                f"longer than {LONGEST_STREAM}."
            )

    @property
    def image_length(self) -> int:
        """N, the number of image tokens."""
        return self.height * self.width

    @property
    def length(self) -> int:
        """S, the length of the stream."""
        return self.text_length + self.image_length

    @property
    def text_ids(self) -> int:
        """Number of rows of the text embedding: the text vocabulary and one padding id for each text position."""
        return self.text_vocab + self.text_length

    @property
    def mask_id(self) -> int:
        """Id of a masked image token in a bidirectional prior: the first id after the image vocabulary."""
        return self.image_vocab

    def pad_text(self, ids: Sequence[int]) -> np.ndarray:
        """Pads a caption to T positions with their padding ids.

        Args:
          ids: at most T ids in [0, text_vocab).

        Returns:
          int32 [T], ids in [0, text_ids).

        Raises:
          ValueError: more than T ids, or an id outside the vocabulary.
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
        """Returns the empty caption, int32 [T]: padding everywhere. Guidance uses it as "no text"."""
        return self.text_vocab + np.arange(self.text_length, dtype=np.int32)

    def text_targets(self, text: jnp.ndarray) -> jnp.ndarray:
        """Converts text ids, int32 [..., T], to classes of the text head, int32 [..., T] in [0, text_vocab].

        All padding ids share the class `text_vocab`, because a position can only hold its own padding id.
        """
        return jnp.minimum(text, self.text_vocab)
