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


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a table that are taken over: `values`, [n, …], for the rows `places`, int [n]."""

    places: np.ndarray
    values: np.ndarray


def match(own: PyTree, given: PyTree, vocabularies: Vocabularies | None = None) -> dict[str, np.ndarray | Rows | None]:
    """Finds an array for each parameter.

    Args:
      own: parameters of the new model, or their shapes.
      given: parameters of the other model, on the host.
      vocabularies: the text vocabularies if they differ. Only the rows of spellings that both have, and those of
        paddings, are then taken over.

    Returns:
      The array for each path, or `Rows` of a text table, or None where name and shape do not agree.
    """
    flat = by_path({**given, "trunk": unstack(given["trunk"])} if "trunk" in given else given)
    unit = len(own.get("trunk", {}).get("units", ()))
    found: dict[str, np.ndarray | Rows | None] = {}
    for name, x in by_path(own).items():
        if vocabularies is not None and _TEXT_TABLES.fullmatch(name):
            found[name] = _rows(x.shape, flat.get(name), vocabularies)
        else:
            array = _find(name, x.shape, flat, unit)
            found[name] = None if array is None or array.shape != x.shape else array
    return found


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


def _rows(shape: tuple[int, ...], given: np.ndarray | None, vocabularies: Vocabularies) -> Rows | None:
    """Returns the given rows of shared spellings and of paddings for a text table; None for another width."""
    if given is None or given.shape[1:] != shape[1:]:
        return None
    old, new = vocabularies.rows()
    paddings = np.arange(min(shape[0] - vocabularies.own_size, len(given) - vocabularies.given_size))
    old = np.concatenate([old, vocabularies.given_size + paddings])
    return Rows(np.concatenate([new, vocabularies.own_size + paddings]), given[old])
