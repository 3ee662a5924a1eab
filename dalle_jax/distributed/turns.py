"""Who does what first: the first host writes and makes shared files; the others wait for it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from dalle_jax.distributed import host_values
from dalle_jax.errors import UserError

_TURN_SECONDS = 24 * 3600  # for what the first host makes alone; should it die, the others hear of it much earlier


def joined() -> bool:
    """Whether `start` joined this process to others."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes; always where it is alone.  Needs no device."""
    return host_values.this_host() == 0


@contextlib.contextmanager
def first_host_first(what: str) -> Iterator[None]:
    """Context that the first host passes through alone; the others enter when it has left.

    For what is made once and then found: in a directory that hosts share the others find it made, on disks of their
    own each makes it.  Every host has to come here equally often; inside of another such context, where a host may have
    nothing to make, it does nothing.

    Args:
      what: is made, for messages.

    Raises:
      UserError: on the others, where the first one failed.
    """
    if _turns.inside or not joined():
        yield
        return
    turn = next(_turns.numbers)
    if not is_first() and (failure := _hear(turn, what)):
        raise UserError(f"The first host could not make {what}: {failure}")
    failure, _turns.inside = None, True
    try:
        yield
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        _turns.inside = False
        if is_first():
            _tell(turn, what, failure)


def first_host_says(what: str, value: Any) -> Any:
    """The first host's `value` (plain JSON), on every host.  Every host has to come here equally often."""
    if not joined():
        return value
    turn = next(_turns.numbers)
    if is_first():
        _tell(turn, what, value)
        return value
    return _hear(turn, what)


class _Turns:
    """Where this host stands among the things that hosts do one after the other."""

    numbers = itertools.count()
    inside = False


_turns = _Turns()


def _tell(turn: int, what: str, value: Any) -> None:
    host_values.tell(f"{turn}", [what, value])


def _hear(turn: int, what: str) -> Any:
    told, value = host_values.wait_for(f"{turn}", _TURN_SECONDS)
    if told != what:
        raise RuntimeError(f"Hosts are out of step: the first one is at {told!r}, this one at {what!r}.")
    return value
