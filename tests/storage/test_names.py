"""A workdir of any name holds a checkpoint that can be read again, or is rejected at the start in one line."""

import os

import jax
import numpy as np
import pytest
from tiny_job import tiny_config, tiny_job

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.workdir import read_config
from dalle_jax.errors import ConfigError
from dalle_jax.training.loop import train


def saved_and_restored(workdir):
    """Trains two steps, and two more after a restart; reads the checkpoint."""
    for steps in (2, 4):
        config = tiny_config(steps=steps, cadence__eval=0, cadence__checkpoint=0)
        state = train(config, workdir, tiny_job(config))
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.steps == [2, 4]
        params = checkpoints.restore_params(ema=False)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(state.params))
    assert read_config(workdir)["steps"] == 4


@pytest.mark.parametrize("name", ["a[b]c", "a*b", "$HOME $x,y%20z#é日本🙂~'\"&;|{b}:@"])
def test_names_that_work(tmp_path, name):
    saved_and_restored(str(tmp_path / name))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["a?b", "$x", "a,b", " a ", "a%b", "a#b", "~", "~x", "x" * 240, "-x", "1", "[", "a*", "a\u3000b", "\ufeff"]
)
def test_more_names_that_work(tmp_path, name):
    saved_and_restored(str(tmp_path / name))
    assert os.listdir(tmp_path) == [name]


def test_neighbours_do_not_mix(tmp_path):
    """A pattern would match both."""
    saved_and_restored(str(tmp_path / "aXb"))
    saved_and_restored(str(tmp_path / "a*b"))


@pytest.mark.parametrize("form", ["file://{}/x%20y", "file://localhost{}/x y"])
def test_addresses_of_files(tmp_path, form):
    saved_and_restored(form.format(tmp_path))
    assert os.listdir(tmp_path) == ["x y"]


@pytest.mark.parametrize(
    "name, said",
    [
        ("a\nb", r"\\n"),
        ("a\tb", r"\\t"),
        ("a\0b", r"\\x00"),
        ("a\x1bb", r"\\x1b"),
        ("a\u2028b", "u2028"),
        ("a\\b", r"\\"),
        ("a\udcff", "udcff"),
        ("x" * 300, "too long"),
        ("x/" * 2000, "3,000"),
        ("**", "pattern"),
        ("a**b", "pattern"),
    ],
)
def test_names_that_do_not(tmp_path, name, said):
    config = tiny_config(steps=1)
    with pytest.raises(ConfigError, match=f"(?i){said}") as error:
        train(config, os.path.join(tmp_path, name), tiny_job(config))
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["http://host/a", "foo://a", "gs://bucket/a[b]", "gs://bucket/a*", "gs://bucket/a#b"])
def test_addresses_that_do_not(name):
    config = tiny_config(steps=1)
    with pytest.raises(ConfigError, match="://|pattern"):
        train(config, name, tiny_job(config))
