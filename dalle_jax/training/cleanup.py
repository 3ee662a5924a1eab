"""Closing a training's resources after an error, and explaining lost hosts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from dalle_jax.distributed.watchdog import lost_host
from dalle_jax.errors import LostHostError, UserError


def close_at_exit(cleanup: contextlib.ExitStack, close: Callable[[], None]) -> None:
    """Calls `close` at the end of the context.

    After an error, a `UserError` of `close` is dropped, because it would hide the first one. After the loss of a host
    or an error with `unwinds = False`, nothing is closed, because closing would wait forever.
    """

    def leave(_: Any, error: BaseException | None, __: Any) -> None:
        if error is not None and (lost_host(error) or not getattr(error, "unwinds", True)):
            return
        try:
            close()
        except UserError:
            if error is None:
                raise

    cleanup.push(leave)


@contextlib.contextmanager
def explain_lost_hosts() -> Iterator[None]:
    """Converts an error inside the block that a lost host caused into a `LostHostError`."""
    try:
        yield
    except Exception as error:
        if message := lost_host(error):
            raise LostHostError(message) from error
        raise
