"""Which errors say that another host is lost. The rest of it is done to real processes: test_survival.py."""

import jax
import pytest

from dalle_jax.watchdog import lost_host

NATIVE = "UNKNOWN: Gloo AllGather failed: connection closed by peer [127.0.0.1]:4"


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
        (ValueError("a connection that is a user's word"), False),
        (caused(RuntimeError("the checkpoint could not be written"), ValueError(NATIVE)), True),
        (caused(RuntimeError("the checkpoint could not be written"), OSError(28, "No space left")), False),
    ],
)
def test_what_says_that_a_host_is_lost(monkeypatch, error, lost):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert bool(lost_host(error)) == lost
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert lost_host(error) is None
