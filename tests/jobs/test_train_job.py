"""Tests of the train job: what happens before a prior's tokenizer is trained."""

import pytest

from dalle_jax.aot.target import load_target
from dalle_jax.errors import ConfigError, MeshError
from dalle_jax.jobs import train as train_job


class Trained(Exception):
    pass


@pytest.fixture
def config(tmp_path):
    config = load_target("configs/prior.py:folder")
    config.workdir, config.tokenizer.workdir = str(tmp_path / "prior"), str(tmp_path / "dvae")
    config.data.path = str(tmp_path / "images")
    return config


@pytest.fixture
def trained(monkeypatch):
    """The configurations of the trainings that would run; the first one raises `Trained`."""
    seen = []

    def train(config, workdir, **_):
        seen.append(config)
        raise Trained

    monkeypatch.setattr(train_job, "train", train)
    return seen


def test_the_tokenizer_trains_on_the_same_images(config, trained):
    with pytest.raises(Trained):
        train_job.run(config, config.workdir)
    assert trained[0].task == "dvae" and trained[0].data.path == config.data.path
    config.tokenizer.data.path = "elsewhere"
    with pytest.raises(Trained):
        train_job.run(config, config.workdir)
    assert trained[1].data.path == "elsewhere"


@pytest.mark.parametrize("wrong", [{"batch_size": 12}, {"mesh.data": 3}])
def test_rejects_meshes_before_training(config, trained, wrong):
    config.update_from_flattened_dict(wrong)
    with pytest.raises(MeshError):
        train_job.run(config, config.workdir)
    assert not trained


@pytest.mark.parametrize(
    "wrong",
    [
        {"profile_steps": -1},
        {"max_nonfinite": 0},
        {"schedules.learning_rate.kind": "no"},
        {"optimizer.decay": "no"},
        {"model.order": "spiral"},
        {"model.order": "random"},  # with attention="sparse"
        {"model.trunk.heads": 3},
        {"model.trunk.remat": "some"},
        {"text.length": 0},
        {"data_tokens": "sometimes"},
        {"data.augment": "flip"},
        {"data.path": ""},
    ],
)
def test_rejects_values_before_training(config, trained, wrong):
    config.update_from_flattened_dict(wrong)
    with pytest.raises(ConfigError):
        train_job.run(config, config.workdir)
    assert not trained
