"""SIGTERM and Ctrl-C as a request to save and stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """Context in which SIGTERM and Ctrl-C set the event that it gives, instead of ending the process at once.

    A second Ctrl-C interrupts as usual.  With several hosts JAX's own preemption service catches SIGTERM and agrees
    on a common step (`Checkpoints.reached_preemption`); a Ctrl-C is passed on to it.  In another thread than the main
    one Python allows no handlers, and nothing is done.
    """
    requested = threading.Event()
    alone = jax.process_count() == 1

    def request(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if alone:
            requested.set()
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        with contextlib.suppress(OSError):  # not by print, which may be at work already
            os.write(2, b"\nstopping: it saves as soon as it can (a second Ctrl-C ends it at once)\n")

    previous = {}
    if threading.current_thread() is threading.main_thread():
        caught = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
        previous = {number: signal.signal(number, request) for number in caught}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: it was not Python's
