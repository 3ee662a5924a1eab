"""Checksums that show whether the arrays read from a checkpoint are, bit for bit, those that were written.

Array files carry their own checksums for small values only, so a flipped bit in a large array would go unnoticed.
Therefore the bits of each array are summed on the devices that hold it, at writing and at reading. The mesh may
differ between the two. A sum costs one pass over the memory and no copy to the host.

There are two rules. The stored checksum of an array names its rule:

    "hash"  two sums of 32 bits, of values that were mixed with their place
    "sum"   Σ (2i + 1)·bits(xᵢ) modulo 2³², of early versions. The weights are odd, so that an even number of changed
            signs does not change the sum. Checkpoints with such sums are checked with them.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.pytree import PyTree, by_path

_ODD = 0x9E3779B1  # 2³² divided by the golden ratio


def of_arrays(tree: PyTree, rule: str = "hash") -> dict[str, dict[str, Any]]:
    """Returns {name: {"shape", "dtype", rule}} of every array of a tree, as JSON values.

    All hosts must call this together, with arrays of the same layout. All get the same checksums.

    Args:
      tree: arrays of any dtype.
      rule: "hash" or "sum".
    """
    arrays = by_path(tree)
    # One after the other: the hosts' exchanges of two programs that run at the same time could block each other.
    found = [np.asarray(_checksum(rule, x)) for x in arrays.values()]
    return {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), rule: checksum.tolist()}
        for (name, x), checksum in zip(arrays.items(), found, strict=True)
    }


def changed_array(stored: Mapping[str, Any], tree: PyTree) -> str | None:
    """Returns the name of the first array whose bits differ from those that `of_arrays` saw, or None.

    Arrays that were read with another dtype than the stored one are not compared.
    """
    rule = "sum" if any("sum" in each for each in stored.values()) else "hash"
    for name, found in of_arrays(tree, rule).items():
        if found["dtype"] == stored[name]["dtype"] and found[rule] != stored[name][rule]:
            return name
    return None


def of_json(value: Any) -> int:
    """Returns the checksum (CRC-32) of a JSON value. It does not depend on the order of keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@functools.partial(jax.jit, static_argnums=0)
def _checksum(rule: str, x: jax.Array) -> jax.Array:
    """Returns the checksum of one array. Arrays of equal shape, dtype and sharding share a compiled program."""
    return {"hash": _hash, "sum": _sum}[rule](_words(x))


def _words(x: jax.Array) -> jax.Array:
    """Returns the bits of each value as uint32. A value of 64 bits becomes two words on a new last axis."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)


def _hash(words: jax.Array) -> jax.Array:
    """Returns Σ mix(xᵢ ⊕ mix(pᵢ)) and Σ mix(xᵢ + qᵢ) modulo 2³², uint32 [2].

    p counts the places of the array, and q is another number of each place. A change of one value changes both sums,
    because `mix` is one to one. Any other change leaves both as they are with a probability of about 2⁻⁶⁴. Sums do not
    depend on the order of their terms, so the mesh does not matter.
    """
    p, q = _place(words.shape, words.shape), _place(words.shape, [_ODD] * words.ndim) * jnp.uint32(_ODD)
    sums = _mix(words ^ _mix(p)), _mix(words + q)
    return jnp.stack([jnp.sum(x, dtype=jnp.uint32) for x in sums])


def _sum(words: jax.Array) -> jax.Array:
    """Returns Σ (2p + 1)·x modulo 2³², uint32, with p the place of x in the array."""
    return jnp.sum(words * (2 * _place(words.shape, words.shape) + 1), dtype=jnp.uint32)


def _place(shape: Sequence[int], factors: Sequence[int]) -> jax.Array:
    """Returns the Horner sum of the indices along all axes modulo 2³², uint32. With `factors` = `shape` it counts."""
    place = jnp.zeros(shape, jnp.uint32)
    for axis, factor in enumerate(factors):
        place = place * jnp.uint32(factor) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return place


def _mix(x: jax.Array) -> jax.Array:
    """Returns the final mix of MurmurHash3, a one-to-one function of uint32 in which each bit reaches all bits."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
