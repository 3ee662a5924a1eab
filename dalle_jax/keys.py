"""Named random streams: every random draw is a function of (seed, what for, step).

No key is carried from one step to the next, so that a run resumed at step n draws exactly what the uninterrupted
run drew at step n, and adding a consumer of randomness changes nobody else's numbers.
"""

from __future__ import annotations

import zlib

import jax


def stream(key: jax.Array, name: str, step: int | jax.Array = 0) -> jax.Array:
    """The key of stream `name` at `step`.

    Args:
      key: scalar key of the run, `jax.random.key(seed)`.
      name: what the numbers are for, such as "init" or "loss".
      step: non-negative step (a Python int or an int32 scalar, traced or not).

    Returns:
      Scalar key, different for every (name, step), the same for the same ones.
    """
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)
