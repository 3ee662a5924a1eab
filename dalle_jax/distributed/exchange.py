"""Work that hosts share: the rows of each host, and the arrays that each of them computed."""

from __future__ import annotations

import io
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

_PIECE = 2**24  # bytes of a host that are exchanged at once; bounds the memory on the devices


def share(count: int) -> range:
    """Returns the part of `count` rows that belongs to this host. The parts of all hosts follow each other."""
    host, hosts = jax.process_index(), jax.process_count()
    return range(host * count // hosts, (host + 1) * count // hosts)


def from_all_hosts(arrays: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Exchanges arrays between hosts, bit for bit. Every host must call it equally often.

    Args:
      arrays: arrays of this host by name. Their shapes, and the names, may differ between hosts.

    Returns:
      The arrays of each host, in the order of the hosts.
    """
    if jax.process_count() == 1:
        return [{name: np.asarray(array) for name, array in arrays.items()}]
    file = io.BytesIO()
    np.savez(file, **arrays)
    content = np.frombuffer(file.getvalue(), np.uint8)
    # Devices have no 64-bit numbers by default.
    high_and_low = np.array(divmod(len(content), 2**31), np.int32)
    sizes = [int(high) * 2**31 + int(low) for high, low in multihost_utils.process_allgather(high_and_low)]
    piece = min(_PIECE, 1 << (max(sizes) - 1).bit_length())  # few sizes, because each of them compiles a program
    found = [np.empty(size, np.uint8) for size in sizes]
    for start in range(0, max(sizes), piece):
        mine = np.zeros(piece, np.uint8)
        here = content[start : start + piece]
        mine[: len(here)] = here
        for array, part in zip(found, multihost_utils.process_allgather(mine)):
            left = array[start : start + piece]
            left[:] = part[: len(left)]
    return [dict(np.load(io.BytesIO(array), allow_pickle=False)) for array in found]
