"""Tests of trees of arrays: paths, comparison and fingerprints."""

import numpy as np

from dalle_jax.pytree import by_path, fingerprint, first_mismatch

TREE = {"a": np.zeros((2, 3)), "b": [np.zeros(4), np.ones(1)]}


def test_paths():
    assert list(by_path(TREE)) == ["a", "b/0", "b/1"]


def test_first_mismatch():
    assert first_mismatch(TREE, TREE) is None and first_mismatch(by_path(TREE), TREE) is None
    assert first_mismatch(TREE, {**TREE, "b": [np.zeros(4)]}) == ("b/1", (1,), None)
    assert first_mismatch({"b": TREE["b"]}, TREE) == ("a", None, (2, 3))
    assert first_mismatch({**TREE, "a": np.zeros(6)}, TREE) == ("a", (6,), (2, 3))


def test_fingerprint():
    """It depends on paths, dtypes, shapes and values, but not on the order of keys."""
    same = fingerprint({"x": np.arange(4.0), "y": np.zeros(2)})
    assert same == fingerprint({"y": np.zeros(2), "x": np.arange(4.0)})
    others = [
        {"x": np.arange(4.0), "z": np.zeros(2)},
        {"x": np.arange(4.0, dtype=np.float32), "y": np.zeros(2)},
        {"x": np.arange(4.0).reshape(2, 2), "y": np.zeros(2)},
        {"x": np.array([0.0, 1.0, 2.0, 4.0]), "y": np.zeros(2)},
    ]
    assert len({same, *map(fingerprint, others)}) == 5
