"""Folders and steps that no model can be loaded from."""

import json
import pathlib

import numpy as np
import pytest

from dalle_jax import ClipScorer, TextToImage
from dalle_jax.checkpoints.folders import check_step
from dalle_jax.errors import CheckpointError, ConfigError

LOADERS = [TextToImage.load, ClipScorer.load]


def workdir(folder, task):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"task": task, "data": {"image_size": 8}, "model": {}}))


@pytest.mark.parametrize("load", LOADERS)
def test_the_folder_around_several_runs_lists_them(load, tmp_path):
    for name, task in (("dvae", "dvae"), ("prior-small", "prior"), ("clip", "clip")):
        workdir(tmp_path / name, task)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for folder in (tmp_path, str(tmp_path), f"{tmp_path}/"):
        with pytest.raises(CheckpointError) as caught:
            load(folder)
        for name in ("dvae (dvae)", "prior-small (prior)", "clip (clip)", "broken"):
            assert f"{tmp_path}/{name}" in str(caught.value)
        assert "notes" not in str(caught.value)


@pytest.mark.parametrize("load", LOADERS)
def test_many_runs_are_counted(load, tmp_path):
    for i in range(25):
        workdir(tmp_path / f"run{i:02}", "prior")
    with pytest.raises(CheckpointError, match="run09.*15 more"):
        load(tmp_path)


@pytest.mark.parametrize("load", LOADERS)
def test_missing_folders_and_files(load, tmp_path):
    with pytest.raises(CheckpointError, match="no folder.*nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file"):
        load(tmp_path / "file")
    with pytest.raises(CheckpointError, match="config.json"):
        load(tmp_path)


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("folder", [None, 5, b"runs", "", " ", "a\0b", ["runs"]], ids=repr)
def test_what_is_no_path(load, folder):
    with pytest.raises(ConfigError, match="path"):
        load(folder)


@pytest.mark.parametrize("load", LOADERS)
def test_rows_and_steps(load, tmp_path):
    for rows in (0, -1, 2.5, "8", None, True, float("nan"), 2**40):
        with pytest.raises(ConfigError, match="rows_at_once"):
            load(tmp_path, rows_at_once=rows)
    for mesh in (8, "cpu", {"data": 1}):
        with pytest.raises(ConfigError, match="make_mesh"):
            load(tmp_path, mesh=mesh)
    for step in (-1, 2.5, "latest", "4e3", True, b"best", [4200], np.arange(2), "9" * 5000):
        with pytest.raises(ConfigError, match="step"):
            load(tmp_path, step=step)


def test_steps():
    assert check_step(None) is None and check_step("best") == "best"
    assert check_step("4200") == check_step(np.int64(4200)) == 4200


def test_a_path_object_is_accepted(tmp_path):
    workdir(tmp_path / "dvae", "dvae")
    with pytest.raises(ConfigError, match="'dvae'"):
        TextToImage.load(pathlib.Path(tmp_path / "dvae"))
