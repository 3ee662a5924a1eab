"""Checksums that show whether the arrays read from a checkpoint are, bit for bit, those that were written.

Array files carry their own checksums for small values only, so a flipped bit in a large array would go unnoticed.
Therefore the bits of each array are summed on the devices that hold it, at writing and at reading. The mesh may
differ between the two. A sum costs one pass over the memory and no copy to the host.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.pytree import PyTree, by_path


def of_arrays(tree: PyTree) -> dict[str, dict[str, Any]]:
    """Returns {name: {"shape", "dtype", "sum"}} of every array of a tree, as JSON values.

    All hosts must call this together, with arrays of the same layout. All get the same sums.
    """
    arrays = by_path(tree)
    sums = jax.device_get(_sums(list(arrays.values())))
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "sum": int(found)}
        for (name, x), found in zip(arrays.items(), sums, strict=True)
    }


def changed_array(stored: Mapping[str, Any], tree: PyTree) -> str | None:
    """Returns the name of the first array whose bits differ from those that `of_arrays` saw, or None.

    Arrays that were read with another dtype than the stored one are not compared.
    """
    for name, found in of_arrays(tree).items():
        if found["dtype"] == stored[name]["dtype"] and found["sum"] != stored[name]["sum"]:
            return name
    return None


def of_json(value: Any) -> int:
    """Returns the checksum (CRC-32) of a JSON value. It does not depend on the order of keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_sum(x) for x in arrays]


def _sum(x: jax.Array) -> jax.Array:
    """Returns Σ (2i + 1)·bits(xᵢ) modulo 2³², with i the place in the array. A flip of any single bit changes it."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
