"""One compilation cache for all processes of a test session.

JAX writes a cache entry in place. Another process may therefore read half of an entry, and a process that is killed
while it writes leaves a damaged one. `share` changes this: an entry is written under another name and then renamed.
"""

from __future__ import annotations

import os
import threading


def share() -> None:
    """Makes this process write whole entries to the cache. Processes that do not call this function only read it."""
    import jax
    from jax._src import lru_cache

    def put(self: lru_cache.LRUCache, key: str, value: bytes) -> None:
        entry = os.path.join(os.fspath(self.path), f"{key}{lru_cache._CACHE_SUFFIX}")
        if os.path.exists(entry):
            return
        unfinished = f"{entry}.{os.getpid()}.{threading.get_ident()}"
        with open(unfinished, "wb") as file:
            file.write(value)
        os.replace(unfinished, entry)

    lru_cache.LRUCache.put = put
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = str(10**6)  # for child processes: never write
