"""Ends the process when another host is lost or training stops making progress.

A host that waits for another one does so in native code, in a collective or at a barrier, where no exception can reach
it. Therefore a thread watches. Hosts report through JAX's coordination service that they are alive, and the training
loop reports progress. If either stops for too long, the thread prints a message and ends the process. It notices a
lost host before JAX does (`LOST_HOST_SECONDS`), because the message of JAX says less.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import threading
import time
from typing import Any, NoReturn, Self

import jax

from dalle_jax.distributed import host_values
from dalle_jax.distributed.joining import lost_host_seconds
from dalle_jax.errors import Preempted

_EARLIER = 0.7  # fraction of JAX's own timeout after which a silent host counts as lost
_LEFT = "left"
_LINGER = 3  # intervals that a stuck host waits, so that the others can print the same message
_SIGNS_OF_HOSTS = ("gloo", "heartbeat", "barrier", "coordination service")
_SIGNS = (*_SIGNS_OF_HOSTS, "connection", "unavailable", "deadline_exceeded")
_beats = itertools.count()  # over all trainings of this process
_ending = threading.Lock()  # held by the thread that ends this process
_RESUME = "Run the same command again on every host: it resumes from the last complete checkpoint."


def end_process(message: str, status: int, linger: float = 0.0) -> NoReturn:
    """Ends this process and its children, whatever its other threads are waiting for.

    Args:
      message: printed at once. Only the first caller prints; a thread that calls later waits for the end.
      status: exit status.
      linger: seconds between the message and the end.
    """
    _ending.acquire()  # never released
    try:
        print(f"error: {message}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        time.sleep(linger)
        for child in multiprocessing.active_children():
            child.kill()
    finally:  # even if nothing can be written: a full disk, a pipe whose reader is gone
        os._exit(status)


class Watchdog:
    """Context that ends this process with status 1 if another host is lost or progress stops.

    Does nothing on a single host.
    """

    def __init__(self, stuck_seconds: float, lost_seconds: float | None = None):
        """Prepares the threads, which start when the context is entered.

        Args:
          stuck_seconds: longest time between two calls of `progress`.
          lost_seconds: longest time without a message of another host. Default: 0.7 of the timeout of JAX.
        """
        lost_seconds = lost_seconds or _EARLIER * lost_host_seconds()
        self._stuck_seconds, self._lost_seconds = stuck_seconds, lost_seconds
        self._interval = min(stuck_seconds, lost_seconds) / 10
        self._me = jax.process_index()
        self._others = [index for index in range(jax.process_count()) if index != self._me]
        self._steps, self._failed = 0, False
        self._heard: dict[int, str | None] = dict.fromkeys(self._others)
        self._leaving = threading.Event()
        # Two threads, because a call to a first host that is gone may itself never return.
        self._threads = [
            threading.Thread(target=target, name="watchdog", daemon=True) for target in (self._talk, self._watch)
        ]

    def __enter__(self) -> Self:
        if self._others:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> None:
        self._failed = error is not None and not isinstance(error, Preempted)
        self._leaving.set()
        if self._others and error is None:
            for thread in self._threads:
                thread.join(self._interval)  # not longer, because the first host may be gone by now

    def progress(self) -> None:
        """Reports progress: a step, a batch of an evaluation, or a checkpoint is done."""
        self._steps += 1

    def _talk(self) -> None:
        while True:
            self._announce(str(next(_beats)))
            for index in self._others:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # no message yet, or as in `_announce`
                    self._heard[index] = host_values.get(f"alive/{index}")
            if self._leaving.wait(self._interval):
                break
        if not self._failed:  # after a failure the others must treat this host as lost
            self._announce(_LEFT)

    def _watch(self) -> None:
        # Time is counted in intervals of this thread, so that a machine that was suspended does not count as stuck.
        heard, silent = dict(self._heard), dict.fromkeys(self._others, 0.0)
        steps, stuck = self._steps, 0.0
        while not self._leaving.wait(self._interval):
            for index in self._others:
                beat = self._heard[index]
                # A host without any message may still be preparing its data.
                if beat == heard[index] not in (None, _LEFT):
                    silent[index] += self._interval
                else:
                    silent[index], heard[index] = 0.0, beat
                if silent[index] > self._lost_seconds:
                    end_process(
                        f"Host {index} of {len(self._others) + 1} was lost: it has been silent for "
                        f"{silent[index]:.0f} s. Its own output has the reason. {_RESUME}", 1
                    )  # fmt: skip
            stuck = stuck + self._interval if steps == self._steps else 0.0
            steps = self._steps
            if stuck > self._stuck_seconds:
                # The others are stuck too. If this host ended at once, they would only report that it was lost.
                end_process(
                    f"No progress for {self._stuck_seconds:g} s (config.timeout_seconds.step), although all hosts are "
                    f"alive. A device or the network between hosts is stuck, or the timeout is too short. {_RESUME}", 1,
                    linger=_LINGER * self._interval,
                )  # fmt: skip

    def _announce(self, beat: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first host, which keeps the store, may be gone
            host_values.put(f"alive/{self._me}", beat, overwrite=True)


def lost_host(error: BaseException) -> str | None:
    """Returns a message if an error or one of its causes says that another host did not answer, else None."""
    if jax.process_count() == 1:
        return None
    seen = []
    while error is not None and error not in seen:
        text = " ".join(str(error).split())
        # Functions of JAX raise some native errors as ValueError. So does tensorstore with errors of a bucket.
        signs = _SIGNS if isinstance(error, jax.errors.JaxRuntimeError) else _SIGNS_OF_HOSTS
        if any(sign in text.lower() for sign in signs):
            return f"Another host was lost during a step: {text[:200]}. Its own output has the reason. {_RESUME}"
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None
