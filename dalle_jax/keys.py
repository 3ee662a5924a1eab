"""Named random streams: every random draw is a function of (seed, stream name, step).

No key is carried from one step to the next. A run that resumes at step n therefore draws the same numbers as an
uninterrupted run. A new stream does not change the numbers of the other streams.
"""

from __future__ import annotations

import zlib

import jax


def stream(key: jax.Array, name: str, step: int | jax.Array = 0) -> jax.Array:
    """Derives the key of a stream at a step.

    Args:
      key: scalar key of the run, `jax.random.key(seed)`.
      name: name of the stream, such as "init" or "loss".
      step: step of at least 0, a Python int or an int32 scalar.

    Returns:
      Scalar key, a function of the arguments, different for every (name, step).
    """
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)
