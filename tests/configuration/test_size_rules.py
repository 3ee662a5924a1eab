"""Sizes that follow the data set: their bounds, and their order."""

import pytest

from dalle_jax.configuration.size_rules import SizeRules
from dalle_jax.errors import ConfigError

RULES = SizeRules(passes=40, min_steps=1500, max_steps=20_000, max_vocab_size=1024, max_text_length=64)


@pytest.mark.parametrize("examples, steps", [(1, 1500), (50, 1500), (300, 3000), (500, 5000), (50_000, 20_000)])
def test_steps(examples, steps):
    assert RULES.steps(examples, batch_size=4) == steps


@pytest.mark.parametrize(
    "captions, words, letters, size",
    [
        (50, 40, 26, 128),  # 66
        (9, 500, 26, 64),  # a word of a single caption needs no id
        (9000, 7000, 40, 1024),
        (9000, 7000, 3000, 6016),  # many alphabets: every letter needs an id
    ],
)
def test_vocabulary(captions, words, letters, size):
    assert RULES.vocab_size(captions, words, letters) == size


@pytest.mark.parametrize("tokens, length", [(1, 8), (9, 12), (12, 12), (63, 64), (500, 64)])
def test_text_length(tokens, length):
    assert RULES.text_length(tokens) == length


@pytest.mark.parametrize("wrong", [{"passes": 0}, {"min_steps": 0}, {"max_steps": 5}, {"max_text_length": 0}])
def test_rejects(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SizeRules(**wrong)
