"""XLA's programs kept on disk, so that the second run of a command starts at once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


def enable() -> str:
    """Turns JAX's persistent compilation cache on, unless JAX_COMPILATION_CACHE_DIR already did.

    Commands, `train` and `TextToImage.load` call it.  JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.

    Returns:
      The directory: $JAX_COMPILATION_CACHE_DIR (which may be remote), or `~/.cache/dalle_jax/xla`.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/dalle_jax/xla"))
    return jax.config.jax_compilation_cache_dir


@contextlib.contextmanager
def turned_off() -> Iterator[None]:
    """Context without that cache: what is compiled for devices that are not there cannot be read back from it."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # else the old setting stays
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
