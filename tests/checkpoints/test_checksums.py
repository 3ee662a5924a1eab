"""Tests of checksums: they cover every array in any layout, and every single bit changes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.checkpoints import checksums
from dalle_jax.distributed.mesh import make_mesh


def by_hand(x):
    bits = np.ascontiguousarray(x).view(f"u{min(x.dtype.itemsize, 4)}").ravel().astype(np.uint64)
    return int(np.sum(bits * (2 * np.arange(bits.size, dtype=np.uint64) + 1)) % 2**32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
def test_sums(dtype, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    found = checksums.of_arrays({"a": {"b": x}})
    assert found == {"a/b": {"shape": list(shape), "dtype": dtype, "sum": by_hand(np.asarray(x))}}


def test_sums_on_any_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 8))
    sharding = jax.sharding.NamedSharding(make_mesh(data=2, fsdp=4), jax.sharding.PartitionSpec("fsdp"))
    assert checksums.of_arrays([jax.device_put(x, sharding)]) == checksums.of_arrays([x])


def test_every_bit_counts():
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    stored = checksums.of_arrays({"x": x})
    assert checksums.changed_array(stored, {"x": x}) is None
    for place in range(x.size):
        for bit in (0, 5, 22, 23, 31):
            changed = x.copy()
            changed.view(np.uint32).ravel()[place] ^= np.uint32(1) << np.uint32(bit)
            assert checksums.changed_array(stored, {"x": changed}) == "x"
    assert checksums.changed_array(stored, {"x": x[::-1].copy()}) == "x"
    assert checksums.changed_array(stored, {"x": jnp.asarray(x, jnp.bfloat16)}) is None  # read as another type


def test_json():
    assert checksums.of_json({"a": 1, "b": [2]}) == checksums.of_json({"b": [2], "a": 1}) != checksums.of_json({"a": 1})
