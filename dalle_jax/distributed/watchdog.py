"""Several hosts: none of them waits for ever for one that is gone.

A host that waits for another does so inside native code, in a collective or at a barrier, where no exception can reach
it.  So a thread watches: hosts tell each other by JAX's coordination service that they are alive, and the loop says
when it gets on.  Where either stops for too long, the thread says so and ends the process.  Of a lost host this
comes before JAX's own end of the others (`LOST_HOST_SECONDS`), which tells less.
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

_EARLIER = 0.7  # share of JAX's own time after which a silent host counts as lost
_LEFT = "left"
_LINGER = 3  # intervals for which a stuck host waits for the others to say the same
_SIGNS_OF_HOSTS = ("gloo", "heartbeat", "barrier", "coordination service")
_SIGNS = (*_SIGNS_OF_HOSTS, "connection", "unavailable", "deadline_exceeded")
_beats = itertools.count()  # over all trainings of this process
_ending = threading.Lock()  # of this process
_GO_ON = "Run the same command again, on every host: it goes on from the last complete checkpoint."


def end_process(message: str, status: int, linger: float = 0.0) -> NoReturn:
    """Ends this process and its children, whatever its other threads wait for.

    Args:
      message: is printed at once, the first one alone: another thread that comes here later waits for the end.
      status: of the process.
      linger: seconds until it ends.
    """
    _ending.acquire()  # for good
    try:
        print(f"error: {message}", file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        time.sleep(linger)
        for child in multiprocessing.active_children():
            child.kill()
    finally:  # also where nothing can be written: a full disk, a pipe whose reader is gone
        os._exit(status)


class Watchdog:
    """Context in which this process ends, with status 1 and a message, where another host is lost or nothing gets on.

    Does nothing where there is one process.
    """

    def __init__(self, stuck_seconds: float, lost_seconds: float | None = None):
        """Starts nothing.

        Args:
          stuck_seconds: the longest time between two calls of `gets_on`.
          lost_seconds: how long another host may be silent; default: somewhat less than JAX itself allows it.
        """
        lost_seconds = lost_seconds or _EARLIER * lost_host_seconds()
        self._stuck_seconds, self._lost_seconds = stuck_seconds, lost_seconds
        self._interval = min(stuck_seconds, lost_seconds) / 10
        self._me = jax.process_index()
        self._others = [index for index in range(jax.process_count()) if index != self._me]
        self._steps, self._failed = 0, False
        self._heard: dict[int, str | None] = dict.fromkeys(self._others)
        self._leaving = threading.Event()
        # Two threads, because talking to a first host that is gone may itself wait for ever.
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
                thread.join(self._interval)  # no longer: the first host may be gone by now

    def gets_on(self) -> None:
        """To be called whenever something has been done: a step, a batch of an evaluation, a checkpoint."""
        self._steps += 1

    def _talk(self) -> None:
        while True:
            self._say(str(next(_beats)))
            for index in self._others:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # it has not spoken yet, or as in `_say`
                    self._heard[index] = host_values.ask(f"alive/{index}")
            if self._leaving.wait(self._interval):
                break
        if not self._failed:  # else nobody shall wait for this host: it is as good as lost
            self._say(_LEFT)

    def _watch(self) -> None:
        # Time is counted in intervals that this thread lived through: a machine that was asleep is not at fault.
        heard, silent = dict(self._heard), dict.fromkeys(self._others, 0.0)
        steps, stuck = self._steps, 0.0
        while not self._leaving.wait(self._interval):
            for index in self._others:
                beat = self._heard[index]
                if beat == heard[index] not in (None, _LEFT):  # whoever never spoke may still be making its data
                    silent[index] += self._interval
                else:
                    silent[index], heard[index] = 0.0, beat
                if silent[index] > self._lost_seconds:
                    end_process(
                        f"Host {index} of {len(self._others) + 1} was lost: nothing heard of it for "
                        f"{silent[index]:.0f} s. What happened is in its own output. {_GO_ON}", 1
                    )  # fmt: skip
            stuck = stuck + self._interval if steps == self._steps else 0.0
            steps = self._steps
            if stuck > self._stuck_seconds:
                # The others are as stuck and about to say so: without this host they would only say that it was lost.
                end_process(
                    f"Nothing got on for {self._stuck_seconds:g} s (config.timeout_seconds.step), though all hosts are "
                    f"there: a device or the network between hosts is stuck, or the time is too short. {_GO_ON}", 1,
                    linger=_LINGER * self._interval,
                )  # fmt: skip

    def _say(self, beat: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the first host keeps what is said: it is silent too
            host_values.tell(f"alive/{self._me}", beat, again=True)


def lost_host(error: BaseException) -> str | None:
    """A message, where an error, or what caused it, says that other hosts did not answer; else None."""
    if jax.process_count() == 1:
        return None
    seen = []
    while error is not None and error not in seen:
        text = " ".join(str(error).split())
        # JAX's own functions raise some of its native errors as ValueError; so does tensorstore those of a bucket.
        signs = _SIGNS if isinstance(error, jax.errors.JaxRuntimeError) else _SIGNS_OF_HOSTS
        if any(sign in text.lower() for sign in signs):
            happened = "What happened is in its own output."
            return f"Another host was lost in the middle of a step: {text[:200]}. {happened} {_GO_ON}"
        seen.append(error)
        error = error.__cause__ or error.__context__
    return None
