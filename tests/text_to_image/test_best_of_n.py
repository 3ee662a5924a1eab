"""The best of N, with random images and a scorer that can be computed by hand: the mean red or blue of an image."""

import dataclasses
import functools
import types
import weakref

import jax
import numpy as np
import pytest

from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.priors.condition import Text
from dalle_jax.text_to_image import best_of_n
from dalle_jax.text_to_image.text_to_image import TextToImage
from dalle_jax.token_layout import TokenLayout

CAPTIONS = ["a red circle", "a blue square", "a green star"]


class ColorScorer:
    """Scores the reddest image highest, or the bluest if the caption says blue. Records its largest batch."""

    def __init__(self):
        self.most = 0

    def score(self, images, captions):
        assert len(images) == len(captions) and images.dtype == np.uint8
        self.most = max(self.most, len(images))
        means = images.astype(np.float32).mean((1, 2))
        return np.where(["blue" in caption for caption in captions], means[:, 2], means[:, 0])


@dataclasses.dataclass
class Table:
    """A model that reads its images from a table, in pieces like those of `TextToImage.chunks`.

    Attributes:
      shape: largest number of captions and images in a piece.
    """

    shape: tuple[int, int]
    scorer: ColorScorer = dataclasses.field(default_factory=ColorScorer)
    workdir: str | None = None
    rows_at_once: int = 64

    def table(self, captions, n, seed):
        rng = np.random.default_rng(seed)
        return rng.integers(0, 256, (len(captions), 99, 2, 2, 3), np.uint8)[:, :n]

    def chunks(self, captions, n, seed=0):
        pieces = []
        for c in range(0, len(captions), self.shape[0]):
            for i in range(0, n, self.shape[1]):
                assert sum(piece() is not None for piece in pieces) <= 1, "pieces are held beyond the next one"
                piece = self.table(captions, n, seed)[c : c + self.shape[0], i : i + self.shape[1]].copy()
                pieces.append(weakref.ref(piece))
                yield c, i, piece
                del piece

    def best_of(self, captions, candidates, keep=1, seed=0):
        return best_of_n.best_of(self, captions, candidates, keep, seed)


@dataclasses.dataclass(frozen=True)
class QuickPrior:
    """Draws "tokens" that are the caption and the key of their row."""

    layout: TokenLayout
    options = types.SimpleNamespace(trunk=types.SimpleNamespace(depth=1))

    def check_sampling(self, options):
        pass

    def sample(self, params, text, keys, **options):
        text = np.repeat(text, len(keys) // len(text), axis=0)
        return np.concatenate([text, jax.random.key_data(keys)], axis=1)


@dataclasses.dataclass(frozen=True)
class QuickTokenizer:
    """Decodes to images that depend on all tokens."""

    def decode(self, params, tokens):
        noise = lambda grid: jax.random.uniform(
            functools.reduce(jax.random.fold_in, grid.ravel(), jax.random.key(0)), (4, 4, 3)
        )
        return jax.vmap(noise)(tokens)


@pytest.fixture(scope="module")
def model():
    text = TextModel.train(CAPTIONS * 9, 40)
    prior = QuickPrior(layout=TokenLayout(Text(text.vocab_size, 8), 24, 2, 5))  # 8 ids and two words of a key
    return TextToImage(prior, {}, QuickTokenizer(), {}, text, 4, rows_at_once=2, scorer=ColorScorer())


def check_best(ranked, candidates):
    """Checks that the highest scores of all candidates [C, N] were kept, in falling order."""
    for caption, drawn, images, scores, numbers in zip(
        CAPTIONS, candidates, ranked.images, ranked.scores, ranked.numbers
    ):
        verdicts = ColorScorer().score(drawn, [caption] * len(drawn))
        expected = np.argsort(-verdicts, kind="stable")[: len(numbers)]
        np.testing.assert_array_equal(numbers, expected)
        np.testing.assert_array_equal(images, drawn[expected])
        np.testing.assert_allclose(scores, verdicts[expected])
    assert len(set(ranked.numbers[:, 0].tolist())) > 1, (
        "candidates of all captions rank alike, so that nothing is tested"
    )


@pytest.mark.parametrize("shape", [(1, 2), (1, 4), (2, 7), (3, 7)], ids=str)
def test_best_of_equals_sorting_all_candidates(shape):
    drawn = Table(shape)
    ranked = drawn.best_of(CAPTIONS, candidates=7, keep=3, seed=3)
    assert ranked.images.shape == (3, 3, 2, 2, 3) and ranked.scores.shape == ranked.numbers.shape == (3, 3)
    assert drawn.scorer.most <= shape[0] * shape[1]
    check_best(ranked, drawn.table(CAPTIONS, 7, 3))


def test_best_of_first_equals_best_of_fewer_candidates():
    drawn = Table((1, 4))
    everything = drawn.best_of(CAPTIONS, candidates=16, keep=16, seed=2)
    for count in (1, 2, 4, 8, 16):
        fewer, expected = everything.best_of_first(count), drawn.best_of(CAPTIONS, candidates=count, seed=2)
        np.testing.assert_array_equal(fewer.numbers, expected.numbers)
        np.testing.assert_array_equal(fewer.images, expected.images)
        np.testing.assert_array_equal(fewer.scores, expected.scores)


def test_of_equal_scores_the_first_candidate_wins():
    level = Table((1, 4), scorer=type("Level", (), {"score": lambda self, x, _: np.zeros(len(x))})())
    assert level.best_of(CAPTIONS, candidates=7, keep=3).numbers.tolist() == [[0, 1, 2]] * 3


def test_generate_returns_the_best_of_the_candidates_that_it_draws(model):
    """At most `rows_at_once`, two, are drawn and scored at once."""
    scorer = ColorScorer()
    model = dataclasses.replace(model, scorer=scorer)
    ranked = model.best_of(CAPTIONS, candidates=5, keep=2, seed=1)
    assert scorer.most == model.rows_at_once == 2
    check_best(ranked, model.generate(CAPTIONS, n=5, seed=1))
    np.testing.assert_array_equal(model.generate(CAPTIONS, n=2, seed=1, candidates=5), ranked.images)
    np.testing.assert_array_equal(model.generate(CAPTIONS, seed=1, candidates=5, keep=2), ranked.images)
    np.testing.assert_array_equal(model.generate(CAPTIONS[0], seed=1, candidates=5), ranked.images[0, :1])


def test_invalid_calls_are_rejected(model):
    without = dataclasses.replace(model, scorer=None)
    with pytest.raises(ConfigError, match="clip"):
        without.generate(CAPTIONS, candidates=4)
    for keep in (0, 5):
        with pytest.raises(ConfigError, match=f"keep is {keep}"):
            model.generate(CAPTIONS, candidates=4, keep=keep)
    with pytest.raises(ConfigError, match="candidates"):
        model.generate(CAPTIONS, keep=2)
    with pytest.raises(DataError, match="(?i)caption"):
        model.generate([], candidates=4)
