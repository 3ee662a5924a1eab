"""What happens before a prior's tokenizer is trained."""

import pytest

from dalle_jax.aot.target import load_target
from dalle_jax.errors import ConfigError, MeshError
from dalle_jax.jobs import train as stages


class Trained(Exception):
    pass


@pytest.fixture
def config(tmp_path):
    config = load_target("configs/prior.py:folder")
    config.workdir, config.tokenizer.workdir = str(tmp_path / "prior"), str(tmp_path / "dvae")
    config.data.path = str(tmp_path / "pictures")
    return config


@pytest.fixture
def trained(monkeypatch):
    """The configurations of what would be trained; it ends at the first."""
    seen = []

    def train(config, workdir):
        seen.append(config)
        raise Trained

    monkeypatch.setattr(stages, "train", train)
    return seen


def test_the_tokenizer_sees_the_same_pictures(config, trained):
    with pytest.raises(Trained):
        stages.run(config, config.workdir)
    assert trained[0].task == "dvae" and trained[0].data.path == config.data.path
    config.tokenizer.data.path = "elsewhere"
    with pytest.raises(Trained):
        stages.run(config, config.workdir)
    assert trained[1].data.path == "elsewhere"


@pytest.mark.parametrize("wrong", [{"batch_size": 12}, {"mesh.data": 3}])
def test_a_mesh_that_does_not_fit_is_refused_before(config, trained, wrong):
    config.update_from_flattened_dict(wrong)
    with pytest.raises(MeshError):
        stages.run(config, config.workdir)
    assert not trained


@pytest.mark.parametrize(
    "wrong",
    [
        {"profile_steps": -1},
        {"max_nonfinite": 0},
        {"schedules.learning_rate.kind": "no"},
        {"optimizer.decay": "no"},
    ],
)
def test_values_that_no_training_can_use_are_refused_before(config, trained, wrong):
    config.update_from_flattened_dict(wrong)
    with pytest.raises(ConfigError):
        stages.run(config, config.workdir)
    assert not trained
