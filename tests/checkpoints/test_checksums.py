"""Tests of checksums: they cover every array in any layout, and every change of bits or places changes them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.checkpoints import checksums
from dalle_jax.distributed.mesh import make_mesh


def words(x):
    return np.ascontiguousarray(x).view(f"u{min(x.dtype.itemsize, 4)}").ravel().astype(np.uint64)


def mix(x):
    """MurmurHash3's final mix, in 64 bits."""
    x = (x ^ (x >> np.uint64(16))) * np.uint64(0x85EBCA6B) % 2**32
    x = (x ^ (x >> np.uint64(13))) * np.uint64(0xC2B2AE35) % 2**32
    return x ^ (x >> np.uint64(16))


def hash_by_hand(x):
    p = np.arange(x.size, dtype=np.uint64)
    places = [sum(i * 0x9E3779B1**k for k, i in enumerate(reversed(place), 1)) % 2**32 for place in np.ndindex(x.shape)]
    q = np.asarray(places, np.uint64)
    first, second = mix(words(x) ^ mix(p)), mix((words(x) + q) % 2**32)
    return [int(first.sum() % 2**32), int(second.sum() % 2**32)]


def sum_by_hand(x):
    return int(np.sum(words(x) * (2 * np.arange(x.size, dtype=np.uint64) + 1)) % 2**32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_both_rules(dtype, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    described = {"shape": list(shape), "dtype": dtype}
    for rule, by_hand in (("hash", hash_by_hand), ("sum", sum_by_hand)):
        assert checksums.of_arrays({"a": {"b": x}}, rule) == {"a/b": {**described, rule: by_hand(np.asarray(x))}}


@pytest.mark.parametrize("axes", [("fsdp",), (None, "fsdp"), (("data", "fsdp"), "tensor"), ()])
def test_checksums_on_any_mesh(axes):
    x = jax.random.normal(jax.random.key(0), (16, 8))
    sharding = jax.sharding.NamedSharding(make_mesh(data=2, fsdp=2, tensor=2), jax.sharding.PartitionSpec(*axes))
    for rule in ("hash", "sum"):
        assert checksums.of_arrays([jax.device_put(x, sharding)], rule) == checksums.of_arrays([x], rule)


def test_every_bit_counts():
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    for rule in ("hash", "sum"):
        stored = checksums.of_arrays({"x": x}, rule)
        assert checksums.changed_array(stored, {"x": x}) is None
        for place in range(x.size):
            for bit in (0, 5, 22, 23, 31):
                changed = x.copy()
                changed.view(np.uint32).ravel()[place] ^= np.uint32(1) << np.uint32(bit)
                assert checksums.changed_array(stored, {"x": changed}) == "x"
        assert checksums.changed_array(stored, {"x": x[::-1].copy()}) == "x"
        assert checksums.changed_array(stored, {"x": jnp.asarray(x, jnp.bfloat16)}) is None  # read as another type


def pairs(x):
    return itertools.combinations(np.ndindex(x.shape), 2)


def test_two_signs():
    """The weights of early versions are odd, so that two flips of the highest bit cancel out."""
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    stored, early = checksums.of_arrays({"x": x}), checksums.of_arrays({"x": x}, "sum")
    for first, second in pairs(x):
        changed = x.copy()
        changed[first] *= -1
        changed[second] *= -1
        assert checksums.changed_array(stored, {"x": changed}) == "x"
        assert checksums.changed_array(early, {"x": changed}) is None, "what early versions miss"
    assert checksums.changed_array(stored, {"x": -x}) == "x"


def test_two_values():
    x = np.random.default_rng(0).integers(0, 4, (4, 5)).astype(np.float32)
    stored = checksums.of_arrays({"x": x})
    for first, second in pairs(x):
        changed = x.copy()
        changed[first], changed[second] = x[second], x[first]
        assert (checksums.changed_array(stored, {"x": changed}) == "x") == (x[first] != x[second])


def test_two_arrays_of_one_shape():
    x, y = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    stored = checksums.of_arrays({"a": {"kernel": x}, "b": {"kernel": y}})
    assert checksums.changed_array(stored, {"a": {"kernel": y}, "b": {"kernel": x}}) == "a/kernel"


def test_shapes_of_the_same_values():
    """Values that moved with the shape do not look alike."""
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    first, second = (checksums.of_arrays([array])["0"]["hash"] for array in (x, x.T.copy()))
    assert first != second


def test_json():
    assert checksums.of_json({"a": 1, "b": [2]}) == checksums.of_json({"b": [2], "a": 1}) != checksums.of_json({"a": 1})
