"""Order among hosts: the first host creates shared files and decides; the others wait for it."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import jax

from dalle_jax.distributed import host_values
from dalle_jax.errors import UserError

# How long the others wait for the first host. If it dies, they notice much earlier.
_TURN_SECONDS = 24 * 3600


def joined() -> bool:
    """Returns whether `joining.start` has joined this process to other hosts."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Returns whether this is the first host, which writes the files. Always true on a single host. Uses no device."""
    return host_values.this_host() == 0


@contextlib.contextmanager
def first_host_first(what: str) -> Iterator[None]:
    """Runs the block on the first host, and afterwards on the others.

    Use it for files that are created once and then found. On a shared file system the others find them; on local
    disks each host creates its own copy. Every host must enter equally many of these blocks. A block inside another
    one does nothing, because a host that finds the files may skip it.

    Args:
      what: name of the thing to create, for messages.

    Raises:
      UserError: on the other hosts, if the block failed on the first one.
    """
    if _turns.inside or not joined():
        yield
        return
    turn = next(_turns.numbers)
    if not is_first() and (failure := _receive(turn, what)):
        raise UserError(f"The first host could not create {what}: {failure}")
    failure, _turns.inside = None, True
    try:
        yield
    except BaseException as error:
        failure = f"{type(error).__name__}: {error}"
        raise
    finally:
        _turns.inside = False
        if is_first():
            _send(turn, what, failure)


def first_host_says(what: str, value: Any) -> Any:
    """Broadcasts a value of the first host to all hosts. Every host must call it equally often.

    Args:
      what: name of the value, for messages.
      value: plain JSON. Ignored on the other hosts.

    Returns:
      The value of the first host.
    """
    if not joined():
        return value
    turn = next(_turns.numbers)
    if is_first():
        _send(turn, what, value)
        return value
    return _receive(turn, what)


class _Turns:
    """Number of the next turn on this host, and whether it is inside of one."""

    numbers = itertools.count()
    inside = False


_turns = _Turns()


def _send(turn: int, what: str, value: Any) -> None:
    host_values.put(f"{turn}", [what, value])


def _receive(turn: int, what: str) -> Any:
    sent, value = host_values.wait_for(f"{turn}", _TURN_SECONDS)
    if sent != what:
        raise RuntimeError(f"Hosts are out of step: the first one is at {sent!r}, this one at {what!r}.")
    return value
