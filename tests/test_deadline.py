"""Tests that begin after `DALLE_JAX_TESTS_UNTIL` are skipped and say so; those before it run."""

import os
import pathlib
import subprocess
import sys
import time

import deadline
import pytest


@pytest.mark.parametrize("value, over", [(None, False), ("", False), ("99", True), ("101", False)])
def test_the_variable(value, over):
    assert deadline.is_over({} if value is None else {deadline.VARIABLE: value}, 100.0) == over


@pytest.mark.parametrize("seconds, expected", [(-1, "1 skipped"), (600, "1 passed")])
def test_a_session(seconds, expected):
    this = f"{pathlib.Path(__file__)}::test_the_variable[99-True]"
    environment = os.environ | {deadline.VARIABLE: str(time.time() + seconds)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n0", "-rs", this], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
    assert ("out of time" in done.stdout) == (seconds < 0)
