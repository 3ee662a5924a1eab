"""How accumulators of many hosts become one.

Every accumulator here is a frozen dataclass that lives on the host, with sums in float64; devices compute what goes in
(features, logits, decibels). Each host adds the rows it holds, and the accumulators are merged once, at the end:

    stats = frechet.add(stats, features, valid)              # on every host, batch after batch
    stats = hosts.merge_over_hosts(stats, frechet.merge)     # on every host, once; the same result on all of them
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Stats = TypeVar("Stats")


def local_rows(x: Any, valid: Any = None) -> np.ndarray:
    """The rows of a batch that this host has to count.

    Args:
      x: [B, ...], numpy or JAX, on one device or sharded over the first axis. Where other hosts hold a part of it, the
        rows on this host's devices, each row on one host only.
      valid: bool [B], laid out like `x`; rows that count (batches filled up to a compiled size have others). None: all.

    Returns:
      [b, ...] on the host, in the order of the batch.

    Raises:
      ValueError: `valid` is not one truth value per row.
    """
    rows = _on_this_host(x)
    if valid is None:
        return rows
    keep = _on_this_host(valid)
    if keep.dtype != bool or keep.shape != rows.shape[:1]:
        raise ValueError(f"valid is {keep.dtype} {keep.shape}; expected bool {rows.shape[:1]}, one for each row.")
    return rows[keep]


def _on_this_host(x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    # A row that several devices hold is the first one's.
    shards = [shard for shard in x.addressable_shards if shard.replica_id == 0]
    shards.sort(key=lambda shard: shard.index[0].start or 0)
    if any(shard.data.shape[1:] != x.shape[1:] for shard in shards):
        raise ValueError(f"A batch of {x.shape} is laid out as {x.sharding}: expected whole rows on every device.")
    return np.concatenate([np.zeros((0, *x.shape[1:]), x.dtype), *(np.asarray(shard.data) for shard in shards)])


def merge_over_hosts(stats: Stats, merge: Callable[[Stats, Stats], Stats]) -> Stats:
    """The accumulators of all hosts in one; nothing to do where there is one host.

    Args:
      stats: this host's: a dataclass of numpy arrays, numbers and strings.
      merge: of its module; applied in the order of the hosts.

    Returns:
      The same on every host. Every host has to call it.
    """
    if jax.process_count() == 1:
        return stats
    # As bytes: JAX would make float32 of float64, and the hosts' arrays need not have one length.
    content = io.BytesIO()
    np.savez(content, **vars(stats))
    content = np.frombuffer(content.getvalue(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(content.size))
    filled = multihost_utils.process_allgather(np.pad(content, (0, sizes.max() - content.size)))

    def read(row: np.ndarray) -> Stats:
        with np.load(io.BytesIO(row.tobytes()), allow_pickle=False) as fields:
            return type(stats)(**{name: array if array.ndim else array.item() for name, array in fields.items()})

    return functools.reduce(merge, [read(row[:size]) for row, size in zip(filled, sizes)])
