"""Whether object storage can be reached at all, found out in seconds. Its clients retry for minutes."""

from __future__ import annotations

import functools
import os
import socket
import threading
import urllib.parse
import urllib.request

from etils import epath

from dalle_jax.errors import ConfigError

_SECONDS = 4.0  # for the name and for the connection together


def check_reachable(path: epath.PathLike | None) -> None:
    """Checks that the server of a "gs://" path answers. Does nothing for other paths, and behind a proxy.

    A server that has answered once is not asked again, because clients retry when a network fails later.

    Raises:
      ConfigError: no connection within 4 seconds.
    """
    if str(path).startswith("gs://") and "https" not in urllib.request.getproxies():
        _connect(os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com")


@functools.cache
def _connect(url: str) -> None:
    parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
    address = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    failures = ["no answer"]

    def connect() -> None:
        try:
            socket.create_connection(address, _SECONDS).close()
            failures.clear()
        except OSError as error:
            failures[:] = [error.strerror or str(error)]

    attempt = threading.Thread(target=connect, daemon=True)  # a name server may be silent for longer than the limit
    attempt.start()
    attempt.join(_SECONDS)
    if failures:
        raise ConfigError(
            f"gs:// cannot be reached: {failures[0]} ({parts.hostname}:{address[1]}). Check the network, or give a "
            "local path."
        )
