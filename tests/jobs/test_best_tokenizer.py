"""A prior freezes the best checkpoint of a tokenizer whose training keeps it, also after an early stop."""

import jax
import numpy as np
import pytest
from test_changed_data import COMMON, MODELS, draw

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.workdir import is_complete, load_tokenizer
from dalle_jax.configuration.config_files import load
from dalle_jax.jobs import train as train_job
from dalle_jax.tasks.dvae import DVAETask


@pytest.mark.parametrize("keep_best, frozen", [(1, 2), (0, 4)])
def test_the_frozen_tokenizer(tmp_path, monkeypatch, keep_best, frozen):
    draw(tmp_path / "images", 5)
    config = load("configs/dvae.py:shapes")
    config.update_from_flattened_dict({**COMMON, **MODELS["dvae"], "keep.best": keep_best, "keep.last": 3})
    config.update_from_flattened_dict({"cadence.eval": 1, "stop_after": 2, "steps": 50})
    config.data.path = str(tmp_path / "images")
    decibels = iter([20.0, 22.0, 21.0, 21.5])
    others = {"codebook_usage": 0.5, "codebook_perplexity": 9.0}
    monkeypatch.setattr(DVAETask, "evaluate", lambda *_: {"psnr": next(decibels), **others})
    assert int(train_job.run(config, str(tmp_path / "dvae")).step) == 4
    assert is_complete(tmp_path / "dvae", config)
    with Checkpoints(str(tmp_path / "dvae"), read_only=True) as checkpoints:
        expected = checkpoints.restore_params(frozen)
    jax.tree.map(np.testing.assert_array_equal, load_tokenizer(tmp_path / "dvae")[1], expected)
