"""JSON of another kind in a workdir: readers name the file, and a training continues where it can."""

import json
import shutil

import numpy as np
import pytest
from damaged_json import DAMAGED, put
from tiny_job import tiny_config, tiny_job

from dalle_jax.checkpoints import frozen
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.workdir import has_config, is_complete, read_config, read_finished
from dalle_jax.errors import CheckpointError
from dalle_jax.jobs.data import _stored_key
from dalle_jax.training.loop import train

KINDS = [*DAMAGED, "list", "folder", "pipe"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    config = tiny_config(steps=2, cadence__eval=1, cadence__checkpoint=1)
    train(config, str(workdir), tiny_job(config))
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    """A workdir of an earlier version, whose config.json has no checksum. `test_damaged_chain` has one with it."""
    copy = shutil.copytree(trained, tmp_path / "copy")
    (copy / "config.json.sha256").unlink()
    return copy


@pytest.mark.parametrize("damage", KINDS)
def test_the_configuration(workdir, damage):
    put(workdir / "config.json", damage)
    with pytest.raises(CheckpointError, match=r"config\.json is damaged") as error:
        read_config(workdir)
    assert "\n" not in str(error.value) and not has_config(workdir)


@pytest.mark.parametrize(
    "key, value",
    [
        ("task", None), ("task", []), ("task", 7), ("data", []), ("data", None), ("data", {}), ("model", "x"),
        ("data", {"image_size": "8"}), ("data", {"image_size": True}), ("text", []), ("text", {}), ("keep", 7),
        ("tokenizer", {"data": []}), ("prior", ["maskgit"]),
    ],
)  # fmt: skip
def test_a_key_of_the_configuration(workdir, key, value):
    config = read_config(workdir)
    (workdir / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError, match=rf"config\.json is damaged: {key}"):
        read_config(workdir)


@pytest.mark.parametrize("damage", ["brackets", "folder"])
def test_a_training_writes_its_configuration_again(workdir, damage):
    put(workdir / "config.json", damage)
    config = tiny_config(steps=3, cadence__eval=0, cadence__checkpoint=0)
    assert int(train(config, str(workdir), tiny_job(config)).step) == 3 and read_config(workdir)["steps"] == 3


@pytest.mark.parametrize("damage", KINDS)
def test_files_that_may_be_missing(workdir, damage):
    """The end of a training, the look at its data, and the metrics of a checkpoint."""
    put(workdir / "finished.json", damage)
    assert read_finished(workdir) == {} and not is_complete(workdir, {"steps": 9, "stop_after": 1})
    put(workdir / "data.json", damage)
    assert _stored_key(str(workdir)) is None
    put(workdir / "checkpoints" / "2" / "metrics" / "metrics", "list" if damage in ("folder", "pipe") else damage)
    with Checkpoints(str(workdir), best_metric="error", read_only=True) as checkpoints:
        assert checkpoints.best_step == 1


@pytest.mark.parametrize("values", [{"step": "2"}, {"best": [1]}, {"best": 7}, {"without_improvement": None}])
def test_the_end_of_a_training(workdir, values):
    (workdir / "finished.json").write_text(json.dumps(read_finished(workdir) | values))
    assert read_finished(workdir) == {} and not is_complete(workdir, {"steps": 9, "stop_after": 1})


@pytest.mark.parametrize("damage", KINDS)
def test_the_times_of_a_checkpoint(workdir, damage):
    put(workdir / "checkpoints" / "2" / "_CHECKPOINT_METADATA", damage)
    with pytest.raises(CheckpointError, match="_CHECKPOINT_METADATA is damaged"):
        Checkpoints(str(workdir), read_only=True)


@pytest.mark.parametrize("item", ["config", "checksums"])
@pytest.mark.parametrize("damage", [*DAMAGED, "list"])
def test_documents_of_a_checkpoint(workdir, item, damage):
    """The checkpoint before is read."""
    put(workdir / "checkpoints" / "2" / item / "metadata", damage)
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        assert checkpoints.config()["steps"] == 2 and checkpoints.latest_step == 1


@pytest.mark.parametrize("damage", KINDS)
def test_the_options_of_a_frozen_module(tmp_path, damage):
    frozen.save(tmp_path / "m", {"a": 1}, {"x": np.zeros(2, np.float32)})
    assert frozen.load(tmp_path / "m", "")[0] == {"a": 1}
    put(tmp_path / "m" / "options.json", damage)
    with pytest.raises(CheckpointError, match=r"options\.json is damaged.*Make it again"):
        frozen.load(tmp_path / "m", "Make it again.")
