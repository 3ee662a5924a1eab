"""Conversion of SIGTERM and Ctrl-C into a request to save and stop."""

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
    """Inside the block, SIGTERM and Ctrl-C set the yielded event instead of ending the process.

    A second Ctrl-C interrupts as usual. With several hosts, JAX's preemption service catches SIGTERM and agrees on a
    common step (`Checkpoints.reached_preemption`), so a Ctrl-C is forwarded to it. Python allows handlers in the main
    thread only. In another thread this does nothing.
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
        with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
            os.write(2, b"\nstopping: saves as soon as possible (a second Ctrl-C ends it at once)\n")

    previous = {}
    if threading.current_thread() is threading.main_thread():
        caught = (signal.SIGTERM, signal.SIGINT) if alone else (signal.SIGINT,)
        previous = {number: signal.signal(number, request) for number in caught}
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not set by Python
