"""The choice of captions of experiments/known_words.py."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from memory_source import MemorySource

from dalle_jax.errors import DataError
from dalle_jax.evaluation.test_sets import Protocol, TestSet

PATH = Path(__file__).parents[2] / "experiments" / "known_words.py"


@pytest.fixture(scope="module")
def known_words():
    spec = importlib.util.spec_from_file_location("known_words", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held_out(captions):
    count = np.arange(len(captions))
    return TestSet(tuple(captions), count, count, None, MemorySource(len(captions)), 8, Protocol("validation"))


def test_only_new_captions_of_known_words_are_chosen(known_words):
    training = ["A red cat.", "a blue dog"]
    captions = ["a red dog", "a red cat", "A Blue, cat!", "a green dog", "a red dog", "…"]
    assert known_words.choose(held_out(captions), training, 9) == [0, 2]


def test_the_chosen_captions_are_spread_over_the_split(known_words):
    captions = [f"{a} {b}" for a in "abcd" for b in "efgh"]
    chosen = known_words.choose(held_out(captions), ["a b c d e f g h"], 4)
    assert chosen == [0, 5, 10, 15]


def test_images_of_a_single_colour_are_passed_over(known_words):
    class Blank(MemorySource):
        def record(self, index):
            record = super().record(index)
            return dataclasses.replace(record, image=np.full((8, 8, 3), 255, np.uint8)) if index == 1 else record

    captions = ["a c", "a d", "b c"]
    test_set = dataclasses.replace(held_out(captions), source=Blank(3))
    assert known_words.choose(test_set, ["a b c d"], 9) == [0, 2]


def test_no_such_caption_is_an_error(known_words):
    with pytest.raises(DataError, match="memory"):
        known_words.choose(held_out(["a horse"]), ["a cat"], 4)


def test_words_can_be_demanded_in_several_captions(known_words):
    training, captions = ["red dog dog", "red cat", "blue cat"], ["blue dog", "cat, red!", "red"]
    assert known_words.choose(held_out(captions), training, 9) == [0, 1, 2]
    assert known_words.choose(held_out(captions), training, 9, min_count=2) == [1, 2]
    with pytest.raises(DataError, match="9 captions"):
        known_words.choose(held_out(captions), training, 9, min_count=9)
