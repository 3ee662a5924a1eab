"""Errors that mean a lost host. `test_survival.py` tests the rest of the watchdog with real processes."""

import os

import jax
import pytest
from processes import finish, spawn

from dalle_jax.distributed.watchdog import lost_host

NATIVE = "UNKNOWN: Gloo AllGather failed: connection closed by peer [127.0.0.1]:4"


CIRCLE = RuntimeError("its own cause")
CIRCLE.__cause__ = CIRCLE


def caused(error, cause):
    try:
        raise error from cause
    except type(error) as raised:
        return raised


@pytest.mark.parametrize(
    "error, lost",
    [
        (jax.errors.JaxRuntimeError(NATIVE), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), False),
        (ValueError(NATIVE), True),  # as multihost_utils raises it
        (ValueError("UNAVAILABLE: Error writing 'gs://b/run': CURL error[7] Couldn't connect to server"), False),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed"), True),
        (caused(RuntimeError("the checkpoint could not be written"), ValueError(NATIVE)), True),
        (caused(RuntimeError("the checkpoint could not be written"), OSError(28, "No space left")), False),
        (CIRCLE, False),
    ],
)
def test_errors_that_mean_a_lost_host(monkeypatch, error, lost):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert bool(lost_host(error)) == lost
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert lost_host(error) is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_the_process_ends_even_if_nothing_can_be_written():
    script = "import sys; from dalle_jax.distributed.watchdog import end_process; sys.stderr = open('/dev/full', 'w')"
    ((status, *_),) = finish([spawn(["-c", f"{script}; end_process('x', 3)"])])
    assert status == 3
