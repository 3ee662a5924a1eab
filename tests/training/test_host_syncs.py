"""In the steady state host and device synchronise in two places: `report` waits for steps, `to_mesh` sends batches.

JAX's transfer guard allows explicit transfers (`device_get`, `device_put`) and raises at any other that it sees. On a
CPU it sees transfers to the device only, because reading an array there copies nothing. These tests therefore also
record every read of an array and every wait for one.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_job import tiny_config, tiny_job

from dalle_jax.training import run as run_module
from dalle_jax.training.loop import train

FIRST, LAST = 4, 9  # the watch starts with the first batch and ends with the other


class Watch:
    """Records the callers that move arrays or wait for them while `on`."""

    def __init__(self, monkeypatch):
        self.on, self._explicit, self.explicit, self.other = False, 0, [], []
        array = type(jnp.zeros(()))
        for name in ("device_get", "device_put"):
            monkeypatch.setattr(jax, name, self._recorded(name, getattr(jax, name), self.explicit))
        monkeypatch.setattr(jax, "block_until_ready", self._recorded("wait", jax.block_until_ready, self.other))
        monkeypatch.setattr(array, "block_until_ready", self._recorded("wait", array.block_until_ready, self.other))
        read = self._recorded("read", array._value.fget, self.other)
        monkeypatch.setattr(array, "_value", property(read))

    def _recorded(self, name, call, where):
        def recorded(*args, **kwargs):
            if self.on and not self._explicit:
                where.append((name, sys._getframe(1).f_code.co_qualname))
            self._explicit += where is self.explicit
            try:
                return call(*args, **kwargs)
            finally:
                self._explicit -= where is self.explicit

        return recorded

    def switch(self, on):
        self.on = on
        jax.config.update("jax_transfer_guard", "disallow" if on else "allow")


class Watched:
    """A training iterator that watches from its batch FIRST to its batch LAST."""

    def __init__(self, batches, watch):
        self._batches, self._watch, self._made = batches, watch, 0

    def __next__(self):
        self._made += 1
        if self._made in (FIRST, LAST):
            self._watch.switch(self._made == FIRST)
        return next(self._batches)

    def get_state(self):
        return self._batches.get_state()


@pytest.fixture
def watch(monkeypatch):
    watch = Watch(monkeypatch)
    yield watch
    watch.switch(False)


def run(workdir, watch, monkeypatch, extra=lambda state, scalars: None, **changes):
    """Trains on eight devices and calls `extra` after each step."""
    mesh = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    config = tiny_config(steps=12, cadence__eval=0, cadence__checkpoint=0, **mesh, **changes)
    job = tiny_job(config)
    make = run_module.make_train_step

    def make_and_do(*args):
        def compiled(*arguments, step):
            state, scalars = step(*arguments)
            extra(state, scalars)
            return state, scalars

        class Lowered:
            def __init__(self, *arguments):
                self._step = make(*args).lower(*arguments).compile()

            def compile(self):
                return self

            def __call__(self, *arguments):
                return compiled(*arguments, step=self._step)

            def memory_analysis(self):
                return self._step.memory_analysis()

        return type("Step", (), {"lower": Lowered})()

    monkeypatch.setattr(run_module, "make_train_step", make_and_do)
    train(config, str(workdir), dataclasses.replace(job, train_batches=lambda: Watched(job.train_batches(), watch)))


@pytest.mark.parametrize("log, fetches", [(1, LAST - FIRST), (4, 1), (100, 0)])
def test_only_the_named_places(tmp_path, watch, monkeypatch, log, fetches):
    """Every step is waited for. Its scalars are copied when they are logged: those of four steps at once."""
    run(tmp_path, watch, monkeypatch, cadence__log=log, max_nonfinite=200)
    fetch = ("device_get", "Scalars.fetch")
    assert set(watch.explicit) == {("device_put", "to_mesh")} | ({fetch} if fetches else set())
    assert watch.explicit.count(fetch) == fetches
    assert watch.other == [("wait", "Scalars.wait")] * (LAST - FIRST)


@pytest.mark.parametrize(
    "extra",
    [
        lambda state, scalars: float(scalars["loss"]),
        lambda state, scalars: np.asarray(state.step),
        lambda state, scalars: jax.block_until_ready(state.params),
        lambda state, scalars: state.step.block_until_ready(),
    ],
)
def test_another_place_is_noticed(tmp_path, watch, monkeypatch, extra):
    run(tmp_path, watch, monkeypatch, extra)
    places = {place for _, place in watch.other} - {"Scalars.wait"}
    assert places and all("<lambda>" in place or "Array" in place for place in places)


def test_another_transfer_is_rejected(tmp_path, watch, monkeypatch):
    with pytest.raises(Exception, match="Disallowed"):
        run(tmp_path, watch, monkeypatch, lambda state, scalars: state.step + np.int32(1))
