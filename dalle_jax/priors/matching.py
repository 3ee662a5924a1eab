"""Matches the parameters of one prior with those of another by name and shape, and their text ids by spelling.

The two priors share the names and shapes of their trunk and embeddings. Scans stack the layers by their attention
patterns, which differ between the priors, so layers are compared one by one.

    V text vocabulary    D width
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

from dalle_jax.models.trunk import unstack
from dalle_jax.pytree import PyTree, by_path

_TEXT_TABLES = re.compile(r"embedding/text(_head_(kernel|bias))?")  # rows: V ids, then paddings


@dataclasses.dataclass(frozen=True)
class Vocabularies:
    """The text vocabularies of two runs, if they differ.

    Attributes:
      given, own: the spelling of each id, or None for a text model that does not list them.
      given_size, own_size: V of both.
    """

    given: Sequence[str] | None
    own: Sequence[str] | None
    given_size: int
    own_size: int

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the ids of the spellings that both have: in the given vocabulary, and in the own one."""
        if self.given is None or self.own is None:
            return np.zeros(0, int), np.zeros(0, int)
        places = {piece: i for i, piece in enumerate(self.given)}
        pairs = [(places[piece], i) for i, piece in enumerate(self.own) if piece in places]
        given, own = zip(*pairs) if pairs else ((), ())
        return np.asarray(given, int), np.asarray(own, int)


def match(
    own: PyTree, given: PyTree, vocabularies: Vocabularies | None = None
) -> tuple[dict[str, np.ndarray | None], list[str]]:
    """Finds an array for each parameter.

    Args:
      own: parameters of the new model, or their shapes.
      given: parameters of the other model, on the host.
      vocabularies: the text vocabularies if they differ. Rows of a spelling that both have are then taken over, and the
        other rows are those of `own`, which must be arrays.

    Returns:
      The array for each path, or None where name and shape do not agree; and the paths of which some rows are fresh.
    """
    flat = by_path({**given, "trunk": unstack(given["trunk"])} if "trunk" in given else given)
    unit = len(own.get("trunk", {}).get("units", ()))
    found, mixed = {}, []
    for name, x in by_path(own).items():
        if vocabularies is not None and _TEXT_TABLES.fullmatch(name):
            found[name] = _rows(x, flat.get(name), vocabularies)
            if found[name] is not None:
                mixed.append(name)
        else:
            array = _find(name, x.shape, flat, unit)
            found[name] = None if array is None or array.shape != x.shape else array
    return found, mixed


def _find(name: str, shape: tuple[int, ...], given: Mapping[str, np.ndarray], unit: int) -> np.ndarray | None:
    """Finds the given array for a parameter, or None.

    For a parameter of a scan, whose repeats are units of `unit` layers, it stacks the arrays of the single layers.
    """
    place = re.fullmatch(r"trunk/units/layer_(\d+)/(.*)", name)
    if place is None:
        return given.get(name)
    layers = [given.get(f"trunk/layer_{r * unit + int(place[1])}/{place[2]}") for r in range(shape[0])]
    if any(layer is None or layer.shape != shape[1:] for layer in layers):
        return None
    return np.stack(layers)


def _rows(own: np.ndarray, given: np.ndarray | None, vocabularies: Vocabularies) -> np.ndarray | None:
    """Returns a text table with the given rows of shared spellings and of paddings; None for another width."""
    if given is None or given.shape[1:] != own.shape[1:]:
        return None
    table, (old, new) = np.array(own), vocabularies.rows()
    table[new] = given[old]
    paddings = min(len(own) - vocabularies.own_size, len(given) - vocabularies.given_size)
    last = slice(vocabularies.own_size, vocabularies.own_size + paddings)
    table[last] = given[vocabularies.given_size : vocabularies.given_size + paddings]
    return table
