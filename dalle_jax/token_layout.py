"""The layout of the token stream of a condition and its image: positions, vocabularies and special ids.

The positions of the condition (a caption, a class) come first, then N = h·w image positions in raster order (DALL-E,
section 2.2). All offsets, lengths and special ids in the package come from the classes here. `priors/condition.py` has
the conditions themselves.

    P prefix length    T ids of a row    h, w grid    N = h·w image tokens    S = P + N
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np

LONGEST_STREAM = 2**15  # positions: a mask of attention over more of them fills the memory of a host
LARGEST_VOCABULARY = 2**24


@dataclasses.dataclass(frozen=True)
class PaddedIds:
    """Rows of ids, such as captions. Each position has its own padding id, which is embedded and never masked.

    Attributes:
      vocab: number of kinds of ids, without padding.
      length: T, ids of a row, padding included.

    Raises:
      ValueError: a size below 1.
    """

    vocab: int
    length: int

    def __post_init__(self):
        _check_positive(self, "vocab", "length")

    @property
    def ids(self) -> int:
        """Number of rows of an embedding: the vocabulary and one padding id for each position."""
        return self.vocab + self.length

    def pad(self, ids: Sequence[int]) -> np.ndarray:
        """Pads a row to T positions with their padding ids.

        Args:
          ids: at most T ids in [0, vocab).

        Returns:
          int32 [T], ids in [0, self.ids).

        Raises:
          ValueError: more than T ids, or an id outside the vocabulary.
        """
        ids = np.asarray(ids, np.int32).reshape(-1)
        if len(ids) > self.length:
            raise ValueError(f"{len(ids)} text tokens do not fit in {self.length} positions: truncate first.")
        if len(ids) and not (0 <= ids.min() and ids.max() < self.vocab):
            raise ValueError(
                f"Text ids from {ids.min()} to {ids.max()} lie outside the vocabulary of {self.vocab}: "
                "was the text encoded with another text model than the one this prior was built for?"
            )
        padded = self.empty()
        padded[: len(ids)] = ids
        return padded

    def empty(self) -> np.ndarray:
        """Returns the empty row, int32 [T]: padding everywhere. Guidance uses it as "no text"."""
        return self.vocab + np.arange(self.length, dtype=np.int32)

    def given(self, row: Sequence[int]) -> list[int]:
        """Returns the ids of a padded row without its padding."""
        return [int(i) for i in row if i < self.vocab]

    def classes(self, *, with_padding: bool) -> int:
        """Returns the number of classes of a head that predicts ids.

        Args:
          with_padding: whether each padding id is a class. Otherwise all of them share one, because a position can only
            hold its own padding id.
        """
        return self.ids if with_padding else self.vocab + 1

    def targets(self, rows: jnp.ndarray, *, with_padding: bool) -> jnp.ndarray:
        """Converts ids, int32 [..., T], to the classes of such a head."""
        return rows if with_padding else jnp.minimum(rows, self.vocab)


class Prefix(Protocol):
    """The part of a condition that a layout needs. It is hashable.

    Attributes:
      length: number of positions before the image.
    """

    @property
    def length(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Sizes and special ids of the stream "condition, then image".

    Attributes:
      condition: what precedes the image; a `priors.condition.Condition` in a prior.
      image_vocab: number of kinds of image token.
      height: h, rows of the image token grid.
      width: w, columns of the image token grid.
      start_tokens: number of start tokens, which are positions of the prefix, too.
      encoded: whether an encoder reads the condition. It then has no positions in the stream.

    Raises:
      ValueError: a size below 1, or more than `LONGEST_STREAM` positions.
    """

    condition: Prefix
    image_vocab: int
    height: int
    width: int
    start_tokens: int = 0
    encoded: bool = False

    def __post_init__(self):
        _check_positive(self, "image_vocab", "height", "width", *([] if self.encoded else ["prefix_length"]))
        if self.length > LONGEST_STREAM:
            raise ValueError(
                f"A stream of {self.prefix_length} positions before {self.height} x {self.width} image positions is "
                f"longer than {LONGEST_STREAM}."
            )

    @property
    def prefix_length(self) -> int:
        """P, the number of positions before the image."""
        return self.start_tokens + (0 if self.encoded else self.condition.length)

    @property
    def image_length(self) -> int:
        """N, the number of image tokens."""
        return self.height * self.width

    @property
    def length(self) -> int:
        """S, the length of the stream."""
        return self.prefix_length + self.image_length

    @property
    def mask_id(self) -> int:
        """Id of a masked image token in a bidirectional prior: the first id after the image vocabulary."""
        return self.image_vocab

    def with_start_tokens(self) -> TokenLayout:
        """Returns the layout of a stream with start tokens: start-of-text, the condition, start-of-image, the grid."""
        return dataclasses.replace(self, start_tokens=2)

    def with_encoder(self) -> TokenLayout:
        """Returns the layout of a stream whose condition an encoder reads: start-of-image, then the grid."""
        return dataclasses.replace(self, start_tokens=1, encoded=True)

    def of_encoder(self) -> TokenLayout:
        """Returns the layout of that encoder: the positions of the condition, as a grid of one row without prefix."""
        return TokenLayout(self.condition, 1, 1, self.condition.length, encoded=True)


def _check_positive(sizes: object, *names: str) -> None:
    """Raises a ValueError if an attribute is below 1."""
    for name in names:
        if (value := getattr(sizes, name)) < 1:
            raise ValueError(f"{type(sizes).__name__}.{name} is {value}; it must be at least 1.")
