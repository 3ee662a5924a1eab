"""The best of N. Random weights, and a judge whose verdicts can be computed: the red of a picture, or its blue."""

import dataclasses

import numpy as np
import pytest
import random_model

from dalle_jax.errors import ConfigError, DataError

CAPTIONS = ["a red circle", "a blue square", "a green star"]


class Judge:
    """Finds the reddest picture fittest, the bluest where the caption says blue. Counts what it sees in one go."""

    def __init__(self):
        self.most = 0

    def score(self, images, captions):
        assert len(images) == len(captions) and images.dtype == np.uint8
        self.most = max(self.most, len(images))
        means = images.astype(np.float32).mean((1, 2))
        return np.where(["blue" in caption for caption in captions], means[:, 2], means[:, 0])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return dataclasses.replace(random_model.text_to_image(tmp_path_factory.mktemp("text")), scorer=Judge())


@pytest.mark.parametrize("rows_at_once", [2, 4, 64])
def test_the_best_of_all_candidates_the_best_first(model, rows_at_once):
    """As if all had been drawn and sorted; yet never more than `rows_at_once` are judged in one go."""
    judge = Judge()
    model = dataclasses.replace(model, scorer=judge, rows_at_once=rows_at_once)
    candidates = model.generate(CAPTIONS, n=7, seed=3)
    ranked = model.best_of(CAPTIONS, candidates=7, keep=3, seed=3)
    assert ranked.images.shape == (3, 3, 16, 16, 3) and ranked.scores.shape == ranked.numbers.shape == (3, 3)
    assert judge.most <= rows_at_once
    for caption, drawn, images, scores, numbers in zip(
        CAPTIONS, candidates, ranked.images, ranked.scores, ranked.numbers
    ):
        verdicts = judge.score(drawn, [caption] * 7)
        expected = np.argsort(-verdicts, kind="stable")[:3]
        np.testing.assert_array_equal(numbers, expected)
        np.testing.assert_array_equal(images, drawn[expected])
        np.testing.assert_allclose(scores, verdicts[expected])
    assert len(set(ranked.numbers[:, 0].tolist())) > 1, "candidates of all captions rank alike: nothing is tested"


def test_the_best_of_fewer(model):
    """From one drawing of many, what each smaller number of candidates would have given."""
    everything = model.best_of(CAPTIONS, candidates=6, keep=6, seed=2)
    for count in (1, 2, 4, 6):
        fewer, expected = everything.best_of_first(count), model.best_of(CAPTIONS, candidates=count, seed=2)
        np.testing.assert_array_equal(fewer.numbers, expected.numbers)
        np.testing.assert_array_equal(fewer.images, expected.images)


def test_generate_returns_the_best_candidates(model):
    ranked = model.best_of(CAPTIONS, candidates=5, keep=2, seed=1)
    np.testing.assert_array_equal(model.generate(CAPTIONS, n=2, seed=1, candidates=5), ranked.images)
    np.testing.assert_array_equal(model.generate(CAPTIONS, seed=1, candidates=5, keep=2), ranked.images)
    np.testing.assert_array_equal(model.generate(CAPTIONS[0], seed=1, candidates=5), ranked.images[0, :1])


def test_of_equal_scores_the_first_candidate_wins(model):
    level = dataclasses.replace(model, scorer=type("Level", (), {"score": lambda self, x, _: np.zeros(len(x))})())
    assert level.best_of(CAPTIONS, candidates=7, keep=3).numbers.tolist() == [[0, 1, 2]] * 3


def test_refused(model):
    without = dataclasses.replace(model, scorer=None)
    with pytest.raises(ConfigError, match="ranked by a CLIP, and this model was loaded without one: give"):
        without.generate(CAPTIONS, candidates=4)
    for keep in (0, 5):
        with pytest.raises(ConfigError, match=f"keep is {keep} of candidates=4; expected 1 to 4"):
            model.generate(CAPTIONS, candidates=4, keep=keep)
    with pytest.raises(ConfigError, match="keep is 2, of how many candidates"):
        model.generate(CAPTIONS, keep=2)
    with pytest.raises(DataError, match="No caption was given"):
        model.generate([], candidates=4)
