"""Trees of arrays: their type, the paths of their leaves, and how two trees compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

PyTree = Any
_DEEPEST = 64


def leaf_path(path: tuple[Any, ...]) -> str:
    """Returns a path of `jax.tree.leaves_with_path` as "trunk/layer_0/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves of a tree by path, in tree order."""
    return {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested dicts of leaves by path: the inverse of `by_path` for a tree of dicts.

    Raises:
      ValueError: a path leads through a leaf, or has more than 64 parts.
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        if len(parents) >= _DEEPEST:  # deeper trees could overflow the stack
            raise ValueError(f"{path[:200]!r} has {len(parents) + 1} parts")
        place = tree
        for name in parents:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise ValueError(f"{path[:200]!r} leads through an array")
        if last in place:
            raise ValueError(f"{path[:200]!r} stands twice, or leads to other arrays")
        place[last] = leaf
    return tree


def first_mismatch(given: PyTree, expected: PyTree) -> tuple[str, Any, Any] | None:
    """Finds the first leaf whose path or shape differs between two trees.

    Args:
      given: tree of arrays.
      expected: tree of arrays or `ShapeDtypeStruct`s, unboxed.

    Returns:
      The leaf's path, its shape in `given` and its shape in `expected` (None where it is absent). None if the trees
      agree.
    """
    old, new = ({path: leaf.shape for path, leaf in by_path(tree).items()} for tree in (given, expected))
    path = next((path for path in sorted({*old, *new}) if old.get(path) != new.get(path)), None)
    return None if path is None else (path, old.get(path), new.get(path))


def fingerprint(tree: PyTree) -> str:
    """Hashes the paths, dtypes, shapes and values of a tree: 16 hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for path, leaf in by_path(tree).items():
        array = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]
