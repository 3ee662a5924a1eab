"""Tests of the progress line and of the prediction of a run's end."""

import io
import re

import pytest

from dalle_jax.reporting import progress
from dalle_jax.reporting.progress import Progress, duration, until


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def predicted(shown, clock, seconds, steps):
    """Advances `steps` steps; returns {step: predicted seconds}."""
    found = {}
    for step in range(1, steps + 1):
        clock.now += seconds(step)
        if (left := shown.predict(step)) is not None:
            found[step] = left
    return found


@pytest.mark.parametrize(
    "first, later, step, left",
    [
        (3.0, 0.1, 11, 0.1 * 989),  # ten steps after the first, which is slow
        (3.0, 2.0, 4, 2.0 * 996),  # five seconds after it
        (74.0, 74.0, 1, 74.0 * 999),  # at once
    ],
)
def test_the_end_is_predicted_once(clock, first, later, step, left):
    out = io.StringIO()
    found = predicted(Progress(0, 1000, 4, out=out), clock, lambda n: first if n == 1 else later, 30)
    assert list(found) == [step] and found[step] == pytest.approx(left)
    assert re.fullmatch(r"\d+ more steps at .+: about .+, until .+\n", out.getvalue())


def test_pauses_count_if_they_are_known(clock):
    shown = Progress(0, 1000, 4, out=io.StringIO())
    shown.pauses = 500.0
    assert predicted(shown, clock, lambda n: 1.0, 20) == {6: pytest.approx(994 * 1.5)}


def test_a_resumed_run_predicts_the_rest(clock):
    shown = Progress(900, 1000, 4, out=io.StringIO())
    clock.now = 1.0
    assert shown.predict(901) is None
    clock.now = 7.0
    assert shown.predict(902) == pytest.approx(6.0 * 98)


def test_a_short_run_predicts_nothing(clock):
    assert predicted(Progress(0, 5, 4, out=io.StringIO()), clock, lambda n: 0.01, 5) == {}


def test_outside_a_terminal_lines_are_plain(clock):
    out = io.StringIO()
    shown = Progress(0, 100, 4, out=out)
    clock.now = 20.0
    shown.show(10, 1.5)
    shown.note("eval")
    shown.close()
    assert out.getvalue() == "train · step 10/100 · 2000 ms/step · 2 examples/s · loss 1.5 · 3 min 0 s left\neval\n"


def test_an_open_line_of_a_terminal_is_ended(clock):
    out = Terminal()
    shown = Progress(0, 100, 4, out=out)
    clock.now = 20.0
    shown.show(10, 1.5)
    assert not out.getvalue().endswith("\n")
    shown.close()
    shown.close()
    assert out.getvalue().endswith(" left\n")


def test_durations():
    texts = {42: "42 s", 320: "5 min 20 s", 11_100: "3 h 5 min", 22_219_200: "257 days 4 h"}
    assert {seconds: duration(seconds) for seconds in texts} == texts
    assert until(60).startswith(", until") and until(1e12) == ""


def test_a_line_is_due_when_it_would_be_printed(clock):
    out = io.StringIO()
    shown = Progress(5, 100, 4, interval=10, out=out)
    for clock.now, step, due in ((11, 5, False), (9, 6, False), (11, 6, True), (12, 7, True)):
        assert shown.is_due(step) == due
    shown.show(7, 1.0)
    assert out.getvalue() and not shown.is_due(8)
