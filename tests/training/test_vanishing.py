"""A workdir that vanishes, is taken over or cannot be written any more ends its training in one line."""

import dataclasses
import json
import os
import shutil

import pytest
from etils import epath
from tiny_job import tiny_config, tiny_job

from dalle_jax.errors import CheckpointError, UserError
from dalle_jax.training.loop import train


def train_and(harm, workdir, **changes):
    """Trains ten steps, and calls `harm` after the third."""
    config, steps = tiny_config(cadence__eval=0, cadence__checkpoint=5, **changes), []

    def data_counts():
        steps.append(1)
        if len(steps) == 3:
            harm()
        return {}

    train(config, str(workdir), dataclasses.replace(tiny_job(config), data_counts=data_counts))


@pytest.mark.parametrize("how", ["deleted", "renamed", "parent renamed", "replaced by a file"])
def test_a_workdir_that_vanishes(tmp_path, how):
    workdir = tmp_path / "runs" / "a"

    def harm():
        if how == "deleted":
            shutil.rmtree(workdir)
        elif how == "parent renamed":
            os.rename(tmp_path / "runs", tmp_path / "old")
        else:
            os.rename(workdir, tmp_path / "b")
        if how == "replaced by a file":
            workdir.touch()

    with pytest.raises(UserError, match=f"{workdir} has vanished") as error:
        train_and(harm, workdir)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "a" / "checkpoints").exists(), "nothing is made there again"


def test_a_workdir_that_vanishes_while_saving(tmp_path, monkeypatch):
    """Between the check and the last byte."""
    workdir = tmp_path / "a"
    monkeypatch.setattr("dalle_jax.checkpoints.ownership.Lease.check", lambda self: shutil.rmtree(workdir))
    with pytest.raises(CheckpointError, match="has vanished"):
        train_and(lambda: None, workdir)


def test_a_workdir_with_another_owner(tmp_path):
    """Somebody deletes the workdir and starts the same command again."""
    workdir = tmp_path / "a"

    def harm():
        owner = json.loads((workdir / "owner.json").read_text())
        shutil.rmtree(workdir)
        workdir.mkdir()
        (workdir / "owner.json").write_text(json.dumps(owner | {"token": "other", "pid": 7}))

    with pytest.raises(CheckpointError, match="process 7"):
        train_and(harm, workdir)
    assert os.listdir(workdir) == ["owner.json"]


def test_a_workdir_that_becomes_read_only(tmp_path, monkeypatch):
    """Root may write everywhere, so that the error is raised by hand."""

    def harm():
        def read_only(*_, **__):
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(type(epath.Path("/")), "mkdir", read_only)

    with pytest.raises(CheckpointError, match="(?i)read-only") as error:
        train_and(harm, tmp_path / "a")
    assert "\n" not in str(error.value)
