"""Reads the arrays of a Flax checkpoint: msgpack of nested dicts, as `flax.serialization.to_bytes` writes it.

The format holds no code, and every length in it is compared with the size of the file before anything is allocated.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import flax.serialization
import numpy as np
from flax import traverse_util

_ROOT = "params"  # the only key of the published files
_MAPS = (*range(0x81, 0x90), 0xDE, 0xDF)  # first bytes of a map with entries
_STRINGS = (*range(0xA1, 0xC0), 0xD9, 0xDA)  # of a string, the first key


def is_one(head: bytes) -> bool:
    """Returns whether a file with these first bytes is a msgpack map whose first key is a string."""
    if not head or head[0] not in _MAPS:
        return False
    start = {0xDE: 3, 0xDF: 5}.get(head[0], 1)
    return len(head) > start and head[start] in _STRINGS


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of a file by name: "encoder/Conv_0/kernel". The root "params" is left out.

    Args:
      path: the file.

    Raises:
      ValueError: the file is damaged, or holds something else than arrays in nested dicts. Damage can raise other
        exceptions, too.
    """
    with open(path, "rb") as file:
        content: Any = flax.serialization.msgpack_restore(file.read())
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of arrays")
    if content.keys() == {_ROOT} and isinstance(content[_ROOT], Mapping):
        content = content[_ROOT]
    arrays = {"/".join(map(str, path)): leaf for path, leaf in traverse_util.flatten_dict(content).items()}
    if wrong := [name for name, leaf in arrays.items() if not isinstance(leaf, np.ndarray)]:
        raise ValueError(f"its entry {wrong[0][:200]!r} is a {type(arrays[wrong[0]]).__name__}, not an array")
    return arrays
