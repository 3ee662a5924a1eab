"""Weights & Biases as a writer, offline; and the sweep. Tests that need the package are skipped without it."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import pytest
import yaml
from tiny_job import tiny_config

from dalle_jax.configuration import config_files
from dalle_jax.errors import ConfigError
from dalle_jax.reporting.metric_writer import MetricWriter, read_metrics, writers_of
from dalle_jax.training.validation import check_values

ROOT = pathlib.Path(__file__).parents[2]
installed = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the package wandb is missing")


def test_names(monkeypatch):
    assert writers_of("tensorboard") == ["tensorboard"] and writers_of("") == []
    with pytest.raises(ConfigError, match="comet"):
        writers_of("tensorboard,comet")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        writers_of("tensorboard,wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert writers_of(" tensorboard , wandb ") == ["tensorboard", "wandb"]


# In a separate process, because wandb starts a service and changes settings.
RUN = """
import sys
import numpy as np
from dalle_jax.reporting.metric_writer import MetricWriter
for start in (0, 2):
    writer = MetricWriter(sys.argv[1], start=start, writers="wandb", config={"steps": 3, "model": {"width": 8}})
    for step in (start + 1, start + 2):
        writer.scalars(step, {"train/loss": 1.0 / step, "eval/psnr": float(step)})
    writer.image(start + 2, "preview", np.zeros((4, 6, 3), np.uint8))
    writer.flush()
    writer.close()
"""


@installed
def test_an_offline_run(tmp_path):
    """Values, images and the configuration are in the run's files. The same workdir is the same run."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    environment |= {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "WANDB_SILENT": "true", "HOME": str(tmp_path)}
    workdir = tmp_path / "my-run"
    workdir.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(workdir)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    files = sorted((workdir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and len({file.name for file in files}) == 1, "one run, opened twice"
    content = files[0].read_bytes()
    assert all(name in content for name in (b"train/loss", b"eval/psnr", b"preview", b"my-run", b"width"))
    assert [line["step"] for line in read_metrics(str(workdir))] == [1, 2, 3, 4]


def test_a_service_that_cannot_be_used(tmp_path, monkeypatch):
    """It is one sentence with the remedy, before anything is trained."""

    class Error(Exception):
        pass

    def init(**_):
        raise Error("No API key configured.\nSee the documentation.")

    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(init=init, errors=types.SimpleNamespace(Error=Error))
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="WANDB_MODE=offline"):
        MetricWriter(str(tmp_path), writers="wandb")


@pytest.fixture
def sweep():
    return yaml.safe_load((ROOT / "experiments" / "sweep.yaml").read_text())


def test_the_sweep_names_keys_that_exist(sweep):
    config = config_files.load("prior:shapes")
    for name in sweep["parameters"]:
        place = config
        for part in name.removeprefix("config.").split("."):
            place = place[part]
        assert isinstance(place, float), name
    assert sweep["metric"] == {"name": "eval/image_nats", "goal": "minimize"}


def _agents_command(sweep):
    """The command of a run in which each parameter is 0.001."""
    arguments = [f"--{name}=0.001" for name in sweep["parameters"]]
    return [word for part in sweep["command"] for word in (arguments if part == "${args}" else [part])]


@installed
def test_wandb_writes_the_command_in_this_way(sweep):
    from wandb.sdk.launch.sweeps import utils

    given = utils.create_sweep_command_args({"args": {name: {"value": 0.001} for name in sweep["parameters"]}})
    parts = utils.create_sweep_command(list(sweep["command"]))
    assert [word for part in parts for word in (given["args"] if part == "${args}" else [part])] == _agents_command(
        sweep
    )


def test_the_sweeps_command_runs(sweep, tmp_path):
    """As an agent runs it: `${args}` becomes one argument for each parameter. `--help` ends it after the flags."""
    command = [*_agents_command(sweep), "--help=all"]
    command = [part.replace("exec python", f"exec {sys.executable}") for part in command]
    command = [part.replace("tensorboard,wandb", "tensorboard") for part in command]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_RUN_ID": "abc", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "schedules.learning_rate.peak=0.001" in done.stdout and "model.trunk.dropout=0.001" in done.stdout
    assert "tokenizer_from='runs/dvae-shapes'" in done.stdout


def test_a_wrong_writer_stops_before_any_work():
    config = tiny_config()
    config.metric_writers = "comet"
    with pytest.raises(ConfigError, match="comet"):
        check_values(config)
