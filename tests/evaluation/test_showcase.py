"""The showcase of a MaskGIT prior: its decoding steps and its edits."""

import dataclasses

import numpy as np
import pytest
import random_model
from random_model import SIDE, SIZE, TRUNK

from dalle_jax.evaluation.showcase import EDITS, edits, showcase, unmasking
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.text_to_image.drawing import GREY

CAPTIONS = ["a red circle", "a green star"]
CELL = SIZE // SIDE
IMAGES = np.random.default_rng(0).integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = random_model.text_to_image(tmp_path_factory.mktemp("text"))
    return dataclasses.replace(made, rows_at_once=8)


def test_the_last_step_is_the_image_of_generate(model):
    frames = unmasking(model, CAPTIONS, 3, steps=3)
    assert frames.shape == (3, 2, SIZE, SIZE, 3)
    np.testing.assert_array_equal(frames[-1], model.generate(CAPTIONS, seed=3, steps=3)[:, 0])
    grey = (frames == GREY).all(-1).reshape(3, 2, SIDE, CELL, SIDE, CELL).all((3, 5)).sum((2, 3))
    assert (grey[0] > grey[1]).all() and (grey[1] > grey[2]).all() and (grey[2] == 0).all()


def test_each_edit_is_the_one_that_it_is_called(model):
    (caption, row), _ = edits(model, IMAGES, CAPTIONS, 3, steps=2)
    assert caption == CAPTIONS[0] and len(row) == len(EDITS)
    real, half, wide, varied, other = row
    np.testing.assert_array_equal(real, IMAGES[0])
    np.testing.assert_array_equal(half[:, : SIZE // 4], real[:, : SIZE // 4])
    assert wide.shape == (SIZE, SIZE + SIZE // 4, 3)
    np.testing.assert_array_equal(wide[:, :SIZE], real)
    np.testing.assert_array_equal(varied, model.vary(real, 1 / 3, CAPTIONS[0], seed=3, steps=2)[0])
    np.testing.assert_array_equal(other, model.generate(CAPTIONS[1], seed=3, steps=2)[0])


def test_a_showcase(model):
    shown = showcase(model, {"steps": 2}, IMAGES, CAPTIONS, seed=3)
    assert [heading for heading, _ in shown.unmasking] == [heading for heading, _ in shown.edits] == CAPTIONS
    assert [caption for caption, _ in shown.unmasking[0][1]] == ["step 1 of 2", "step 2 of 2"]
    assert [caption for caption, _ in shown.edits[0][1]] == list(EDITS)
    raster = AutoregressivePrior(model.prior.layout, AutoregressiveOptions(TRUNK, kernel=3))
    assert showcase(dataclasses.replace(model, prior=raster), {}, IMAGES, CAPTIONS, seed=3) is None
