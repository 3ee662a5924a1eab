"""A prior never freezes another checkpoint of its tokenizer than the one that the training ended with, or kept."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from test_changed_data import COMMON, MODELS, draw

from dalle_jax.checkpoints import checksums
from dalle_jax.checkpoints.workdir import load_tokenizer, tokenizer_step
from dalle_jax.configuration.config_files import load
from dalle_jax.errors import CheckpointError, ConfigError, DamagedError
from dalle_jax.jobs import train as train_job
from dalle_jax.jobs.checks import check_config
from dalle_jax.jobs.preparation import prepare
from dalle_jax.storage import checksummed


def tokenizer_config(images, **changes):
    config = load("configs/dvae.py:shapes")
    config.update_from_flattened_dict({**COMMON, **MODELS["dvae"], "steps": 6, "data.path": str(images)})
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training of six steps, with checkpoints of steps 4 and 6."""
    folder = tmp_path_factory.mktemp("tokenizer")
    draw(folder / "images", 5)
    train_job.run(tokenizer_config(folder / "images"), str(folder / "dvae"))
    return folder / "dvae"


@pytest.fixture
def dvae(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "dvae")
    return tmp_path / "dvae"


def flip(workdir, step):
    """Changes bits of the average, which is read, and of the parameters, from which a training resumes.

    A file may hold bytes that nothing refers to. Bits are therefore changed at nine places of every file.
    """
    for item in ("ema", "params"):
        for path in (workdir / "checkpoints" / str(step) / item).rglob("d/*"):
            content = bytearray(path.read_bytes())
            for tenth in range(1, 10):
                content[len(content) * tenth // 10] ^= 16
            path.write_bytes(content)


def lose(workdir, step):
    shutil.rmtree(workdir / "checkpoints" / str(step))


@pytest.mark.parametrize("harm", [flip, lose])
def test_the_newest_checkpoint(trained, dvae, harm):
    harm(dvae, 6)
    with pytest.raises(DamagedError, match=r"step 6.*--config\.tokenizer_step=4"):
        load_tokenizer(dvae)
    with pytest.raises(CheckpointError, match="step 3"):
        load_tokenizer(dvae, 3)
    _, expected = load_tokenizer(trained, 4)
    jax.tree.map(np.testing.assert_array_equal, load_tokenizer(dvae, 4)[1], expected)


@pytest.mark.parametrize("harm", [flip, lose])
def test_its_own_tokenizer_is_trained_on(trained, dvae, tmp_path, harm):
    """A prior with a damaged tokenizer trains it to the same end as before."""
    harm(dvae, 6)
    config = load("configs/prior.py:shapes")
    config.update_from_flattened_dict(COMMON)
    config.update_from_flattened_dict({"data.path": str(trained.parent / "images"), "tokenizer.steps": 6})
    config.tokenizer.update_from_flattened_dict({**COMMON, **MODELS["dvae"]})
    config.tokenizer.data.path = config.data.path
    config.tokenizer.workdir = str(dvae)
    train_job._freeze_tokenizer(config, str(tmp_path / "prior"))
    _, expected = load_tokenizer(trained)
    jax.tree.map(np.testing.assert_array_equal, load_tokenizer(tmp_path / "prior")[1], expected)


def test_another_runs_tokenizer_is_rejected_early(dvae, tmp_path):
    lose(dvae, 6)
    config = load("configs/prior.py:shapes")
    config.update_from_flattened_dict(COMMON | {"tokenizer_from": str(dvae), "data.path": str(dvae.parent)})
    with pytest.raises(DamagedError, match=r"--config\.tokenizer_step=4"):
        check_config(prepare(config), str(tmp_path / "prior"))
    config.tokenizer_step = 5
    with pytest.raises(ConfigError, match=r"tokenizer_step=5.*\[4\]"):
        check_config(prepare(config), str(tmp_path / "prior"))
    config.tokenizer_step = 4
    check_config(prepare(config), str(tmp_path / "prior"))


def test_a_training_that_continued_after_its_end(dvae):
    """A longer training, interrupted after step 8, gives its latest checkpoint."""
    shutil.copytree(dvae / "checkpoints" / "6", dvae / "checkpoints" / "8")
    assert tokenizer_step(dvae) == 8


def with_checksum(finished):
    values = {name: value for name, value in finished.items() if name != "checksum"}
    return {**values, "checksum": checksums.of_json(values)}


def test_the_best_checkpoint(dvae):
    config = json.loads((dvae / "config.json").read_text())
    checksummed.write_json(dvae / "config.json", {**config, "keep": {"last": 1, "best": 1}})
    best = json.loads((dvae / "finished.json").read_text())["best"]["step"]
    assert tokenizer_step(dvae) == best
    finished = json.loads((dvae / "finished.json").read_text())
    finished["best"]["value"] += 1
    (dvae / "finished.json").write_text(json.dumps(with_checksum(finished)))
    with pytest.raises(DamagedError, match="another training"):
        tokenizer_step(dvae)
    finished["best"]["value"] -= 1
    (dvae / "finished.json").write_text(json.dumps(with_checksum(finished)))
    lose(dvae, best)
    with pytest.raises(DamagedError, match=f"step {best}"):
        tokenizer_step(dvae)


@pytest.mark.parametrize("before, after", [('"step": 6', '"step": 4'), ("{", "["), ('"step"', '"stop"')])
def test_a_changed_end(dvae, before, after):
    """finished.json names the best checkpoint; a changed digit would name another one."""
    path = Path(dvae) / "finished.json"
    assert before in path.read_text()
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(DamagedError, match="finished.json"):
        load_tokenizer(dvae)


def test_an_end_without_a_checksum(dvae):
    """Earlier versions wrote none."""
    finished = json.loads((dvae / "finished.json").read_text())
    del finished["checksum"]
    (dvae / "finished.json").write_text(json.dumps(finished))
    assert tokenizer_step(dvae) == 6
