"""Compiled programs of a test session: one cache on disk for all processes, and not too many in memory.

JAX writes a cache entry in place. Another process may therefore read half of an entry, and a process that is killed
while it writes leaves a damaged one. `share` changes this: an entry is written under another name and then renamed.

A compiled program takes about twelve memory mappings, and Linux allows a process 65,530. XLA ends the process with a
segmentation fault when it gets no more. `forget` keeps a process far below this limit.
"""

from __future__ import annotations

import gc
import os
import threading
import zlib
from pathlib import Path

_SHARED = "DALLE_JAX_TEST_CACHE"  # the folder, for the processes that `preloaded` starts


def share() -> None:
    """Makes this process use the shared folder, and write whole entries to it.

    The folder is $JAX_COMPILATION_CACHE_DIR. Other processes that a test starts write as JAX does, so this variable
    then names a folder that only the children of this process use.
    """
    import jax
    from jax._src import compilation_cache, lru_cache

    def put(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
        entry = os.path.join(os.fspath(self.path), f"{key}{lru_cache._CACHE_SUFFIX}")
        if os.path.exists(entry):
            return
        unfinished = f"{entry}.{os.getpid()}.{threading.get_ident()}"
        with open(unfinished, "wb") as file:
            file.write(value)
        os.replace(unfinished, entry)

    lru_cache.LRUCache.put = put
    if not (compilation_cache.zstd or compilation_cache.zstandard):
        compilation_cache.compress_executable = lambda executable: zlib.compress(executable, 1)  # a third of the time
    shared = os.environ.setdefault(_SHARED, os.environ["JAX_COMPILATION_CACHE_DIR"])
    jax.config.update("jax_compilation_cache_dir", shared)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(shared, f"children_of_{os.getpid()}")


def forget(limit: int) -> None:
    """Drops all compiled programs of this process if it has more than `limit` memory mappings (Linux only)."""
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > limit:
        import jax

        jax.clear_caches()
        gc.collect()
