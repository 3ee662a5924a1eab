"""One example as a source stores it, and the error for one that must be skipped.

H, W image size
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from dalle_jax.errors import DataError


class UnreadableExample(DataError):
    """One example that must be skipped.

    Attributes:
      reason: the heading under which it is counted, a few words.
      name: the example's name.
      detail: what was found, or "".
    """

    def __init__(self, reason: str, name: str, detail: str = ""):
        super().__init__(f"{name}: {reason}" + (f" ({detail})" if detail else ""))
        self.reason, self.name, self.detail = reason, name, detail

    def __reduce__(self):
        return UnreadableExample, (self.reason, self.name, self.detail)


@dataclasses.dataclass(frozen=True)
class Record:
    """One example as stored.

    Attributes:
      image: encoded bytes (PNG, JPEG, …), or uint8 [H, W, 3 or 1].
      captions: zero or more captions, as text or as bytes that should be UTF-8.
      name: the example's name, for messages.
      extra: the other features of the example (text as str, numbers and arrays as numpy).
    """

    image: bytes | np.ndarray
    captions: tuple[str | bytes, ...]
    name: str
    extra: Mapping[str, Any]
