"""JAX's persistent compilation cache, with which the second run of a command starts faster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache


def enable() -> str:
    """Enables the cache, which JAX_ENABLE_COMPILATION_CACHE=false disables again.

    Commands, `train` and `TextToImage.load` call it.

    Returns:
      The folder of the cache: $JAX_COMPILATION_CACHE_DIR, which may be remote, or `~/.cache/dalle_jax/xla`.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/dalle_jax/xla"))
    return jax.config.jax_compilation_cache_dir


@contextlib.contextmanager
def turned_off() -> Iterator[None]:
    """Context without the cache, because programs for absent devices cannot be read back from it."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # without it the old setting stays
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
