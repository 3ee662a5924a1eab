"""Checksums of a checkpoint: whether what was read is, bit for bit, what the devices held when it was written.

Array files carry checksums of their own for small values only; a flipped bit in a large array would be read back as a
number like any other.  So each array's bits are summed on the devices that hold it, when it is written and when it
is read, whatever mesh either runs on: one pass over the memory, no copy to the host.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dalle_jax.pytree import PyTree, leaf_path


def of_arrays(tree: PyTree) -> dict[str, dict[str, Any]]:
    """{name: {"shape", "dtype", "sum"}} of every array of a tree, as JSON values.

    With several hosts all of them have to call this, with arrays of the same layout; all get the same sums.
    """
    sums = jax.device_get(_sums(jax.tree.leaves(tree)))
    return {
        name: {**value, "dtype": str(x.dtype), "sum": int(found)}
        for (name, value), x, found in zip(shapes(tree).items(), jax.tree.leaves(tree), sums, strict=True)
    }


def shapes(tree: PyTree) -> dict[str, dict[str, Any]]:
    """{name: {"shape"}} of every array of a tree, abstract or not."""
    return {leaf_path(path): {"shape": list(x.shape)} for path, x in jax.tree.leaves_with_path(tree)}


def changed_array(stored: Mapping[str, Any], tree: PyTree) -> str | None:
    """The first array of `tree` whose bits are not those that `of_arrays` saw; None where there is none.

    Arrays that were read as another type than they had are not compared.
    """
    for name, found in of_arrays(tree).items():
        if found["dtype"] == stored[name]["dtype"] and found["sum"] != stored[name]["sum"]:
            return name
    return None


def other_shape(stored: Mapping[str, Any], tree: PyTree) -> str | None:
    """The first array that `shapes` or `of_arrays` saw and `tree` do not share, with both shapes; or None."""
    old, new = ({name: tuple(x["shape"]) for name, x in found.items()} for found in (stored, shapes(tree)))
    name = next((name for name in sorted({*old, *new}) if old.get(name) != new.get(name)), None)
    return None if name is None else f"{name} is {old.get(name)} there, {new.get(name)} here"


def of_json(value: Any) -> int:
    """The checksum (CRC-32) of a JSON value, whatever the order of its keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [_sum(x) for x in arrays]


def _sum(x: jax.Array) -> jax.Array:
    """Σ (2i + 1)·bits(xᵢ) modulo 2³², i the place in the array: no single flipped bit leaves it as it was."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
