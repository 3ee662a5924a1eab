"""A training whose data set changed: what is named, and how to continue from its parameters."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax.configuration.config_files import load
from dalle_jax.errors import DataChanged, UserError
from dalle_jax.jobs import train as train_job
from dalle_jax.reporting.metric_writer import read_metrics

COMMON = {
    "data.source": "folder", "data.image_size": 16, "data.workers": 0, "data.builder_kwargs": {}, "data.cache": False,
    "data.train_split": "all", "data.eval_split": "all", "batch_size": 8, "eval_batches": 1, "mesh.data": 1,
    "cadence.log": 1, "cadence.eval": 2, "cadence.preview": 2, "cadence.checkpoint": 2,
}  # fmt: skip
MODELS = {
    "dvae": {"model.vocab_size": 16, "model.hidden": 16, "model.blocks_per_group": 1, "model.codebook_dim": 8}
    | {"objective.init": "paper"},
    "clip": {"model.image_width": 16, "model.image_heads": 2, "model.text_width": 16, "model.text_heads": 2}
    | {"model.text_depth": 1, "model.embed_dim": 8, "text.vocab_size": 60, "text.length": 8, "negatives.spoiled": 0},
}
COLORS = ("red", "green", "blue", "pink", "grey")


def draw(folder, count):
    folder.mkdir(exist_ok=True)
    for i in range(count):
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {COLORS[i % 5]} square")


def run(kind, folder, workdir, steps=2, start_from=None):
    config = load(f"configs/{kind}.py:shapes")
    config.update_from_flattened_dict({**COMMON, **MODELS[kind]})
    config.data.path, config.steps, config.start_from = str(folder), steps, start_from
    return train_job.run(config, str(workdir))


@pytest.mark.parametrize("kind", MODELS)
def test_continues_in_another_workdir(tmp_path, kind):
    """Added images end a resumed training with the command that starts another one from its parameters."""
    draw(tmp_path / "images", 5)
    old, new = tmp_path / "old", tmp_path / "new"
    before = run(kind, tmp_path / "images", old)
    draw(tmp_path / "images", 6)
    with pytest.raises(DataChanged, match=rf"5 examples.* 6 now.*--config.start_from={old}"):
        run(kind, tmp_path / "images", old, steps=4)
    draw(tmp_path / "others", 7)
    with pytest.raises(UserError, match="data.path"):
        run(kind, tmp_path / "others", old, steps=4)
    first = run(kind, tmp_path / "images", new, steps=1, start_from=str(old))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), first.params, before.eval_params)
    assert max(jax.tree.leaves(moved)) < 0.1  # one update away
    assert int(run(kind, tmp_path / "images", new, steps=2, start_from=str(old)).step) == 2
    assert all(value is not None for line in read_metrics(str(new)) for value in line.values())


@pytest.mark.parametrize("kind", MODELS)
def test_a_wrong_start_names_its_key(tmp_path, kind):
    draw(tmp_path / "images", 5)
    with pytest.raises(UserError, match="config.start_from"):
        run(kind, tmp_path / "images", tmp_path / "new", start_from=str(tmp_path / "nowhere"))
    other = next(name for name in MODELS if name != kind)
    run(other, tmp_path / "images", tmp_path / "other", steps=1)
    with pytest.raises(UserError, match=f"config.start_from.*{other}"):
        run(kind, tmp_path / "images", tmp_path / "new", start_from=str(tmp_path / "other"))


def test_the_start_is_not_needed_to_resume(tmp_path):
    """The run that a training started from may be deleted."""
    draw(tmp_path / "images", 5)
    run("dvae", tmp_path / "images", tmp_path / "old", steps=1)
    run("dvae", tmp_path / "images", tmp_path / "new", steps=1, start_from=str(tmp_path / "old"))
    shutil.rmtree(tmp_path / "old")
    assert int(run("dvae", tmp_path / "images", tmp_path / "new", start_from=str(tmp_path / "old")).step) == 2
