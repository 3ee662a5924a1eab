"""The rows and the table of experiments/step_ladder.py."""

import dataclasses
import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from random_model import TRUNK, text_to_image

from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior

PATH = Path(__file__).parents[2] / "experiments" / "step_ladder.py"
SAMPLING = {"temperature": 1.0, "order": None}


@pytest.fixture(scope="module")
def step_ladder():
    spec = importlib.util.spec_from_file_location("step_ladder", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def maskgit(tmp_path_factory):
    return text_to_image(tmp_path_factory.mktemp("text"))


def autoregressive(model, **options):
    prior = AutoregressivePrior(model.prior.layout, AutoregressiveOptions(TRUNK, **options))
    params = nn.meta.unbox(jax.jit(prior.init)(jax.random.key(1)))
    return dataclasses.replace(model, prior=prior, params=params)


def test_rows_of_each_prior(step_ladder, maskgit):
    random = autoregressive(maskgit, attention="full", order="random")
    names = lambda model: list(step_ladder.ladder(model, [4, 2], SAMPLING, 1.0))
    assert names(maskgit) == ["4 steps", "2 steps"]
    assert (
        names(random)
        == names(autoregressive(maskgit, attention="full", order="diagonal"))
        == ["one by one", "4 steps", "2 steps"]
    )
    assert names(autoregressive(maskgit, kernel=3)) == ["one by one"]
    rows = step_ladder.ladder(random, [4, 2], SAMPLING, 1.0)
    captions = ["a red circle above a blue square"]
    for row, steps in (("one by one", {}), ("4 steps", {"steps": 4}), ("2 steps", {"steps": 2})):
        expected = random.generate(captions, seed=3, temperature=1.0, **steps)[:, 0]
        np.testing.assert_array_equal(rows[row](captions, 3), expected)


def test_the_table_has_a_cell_for_each_prior_and_row(step_ladder):
    row = lambda share: {"caption_accuracy": share, "attribute_accuracy": 1.0, "ms_per_image": 7.04}
    found = {"prior": {"one by one": row(0.5), "8 steps": row(0.25)}, "maskgit": {"8 steps": row(0.9)}}
    assert step_ladder.markdown(found).splitlines() == [
        "| Steps | prior: captions right | prior: ms an image | maskgit: captions right | maskgit: ms an image |",
        "| --- | --- | --- | --- | --- |",
        "| one by one | 0.500 | 7.0 |  |  |",
        "| 8 steps | 0.250 | 7.0 | 0.900 | 7.0 |",
    ]
