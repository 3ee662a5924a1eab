"""The vocabularies of YouTokenToMe: the ids of the original code, dropout, and files that are none."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from youtokentome_cases import CAPTIONS, LETTERS, MERGES, vocabulary_of

from dalle_jax.data import text_models
from dalle_jax.data.text import TextModel
from dalle_jax.data.youtokentome import YouTokenToMe
from dalle_jax.errors import DataError

MODEL = YouTokenToMe(vocabulary_of().encode())


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ids_are_those_of_the_original(caption):
    """Between begin and end, in lower case, cut off at the end."""
    expected = [2, *CAPTIONS[caption], 3]
    assert MODEL.encode(caption.upper(), max_length=99) == (expected, False)
    assert MODEL.encode(caption, max_length=3) == (expected[:3], len(expected) > 3)


@settings(max_examples=200, deadline=None, database=None)
@given(words=st.lists(st.text("абвгд", min_size=1, max_size=12), min_size=1, max_size=3))
def test_merges_in_their_order(words):
    """Each merge, everywhere from left to right, before the next one: the definition of byte-pair encoding."""
    expected = []
    for word in words:
        parts = [4 + LETTERS.index(letter) for letter in "\u2581" + word]
        for left, right, merged in MERGES:
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [merged]
                i += 1
        expected += parts
    caption = " ".join(words)
    assert MODEL.encode(caption, max_length=999)[0][1:-1] == expected
    assert MODEL.decode([2, *expected, 3]) == caption


def test_dropout_is_seeded_and_keeps_the_text():
    cut = [MODEL.encode("абабаб вгд", max_length=99, dropout=0.5, seed=seed)[0] for seed in range(20)]
    assert cut == [MODEL.encode("абабаб вгд", max_length=99, dropout=0.5, seed=seed)[0] for seed in range(20)]
    assert len({tuple(ids) for ids in cut}) > 5 and {MODEL.decode(ids) for ids in cut} == {"абабаб вгд"}
    with pytest.raises(ValueError, match="seed"):
        MODEL.encode("аб", max_length=9, dropout=0.5)


def test_blanks_and_unknown_letters():
    assert MODEL.encode(" \n\u2581", max_length=9) == ([], False)
    assert MODEL.unknown_letters("Аб Жюж 1") == "жю1"
    assert MODEL.decode([2, 4, 1, 5, 3]) == "\u2047 а"


def test_a_file_is_recognised_and_frozen(tmp_path):
    (tmp_path / "bpe.model").write_text(vocabulary_of())
    model = text_models.load(tmp_path / "bpe.model")
    assert isinstance(model, YouTokenToMe) and model.vocab_size == 16
    model.save(tmp_path / model.file_name)
    again = pickle.loads(pickle.dumps(text_models.load(tmp_path / model.file_name)))
    assert again.encode("аб", max_length=9) == MODEL.encode("аб", max_length=9)
    assert model.file_name in text_models.FILE_NAMES
    TextModel.train(["a few words"], 30, tmp_path / "sentencepiece.model")
    assert isinstance(text_models.load(tmp_path / "sentencepiece.model"), TextModel)


@pytest.mark.parametrize(
    ("content", "token"),
    [
        (vocabulary_of()[:-10], "ends too early"),
        (vocabulary_of() + "7", "first line"),
        (vocabulary_of(letters="абвгде"), "▁"),
        (vocabulary_of(special="1 0 2 -1"), "14"),
        (vocabulary_of(special="1 -1 -1 0"), "13"),
        (vocabulary_of(merges=((4, 99, 10),)), "99"),
        (vocabulary_of(merges=((4, 5, 10), (5, 5, 10))), "ids"),
        ("99999999 99999999\n1 2", "99999999"),
        ("6 1\nнет", "YouTokenToMe"),
    ],
)
def test_damaged_files(tmp_path, content, token):
    (tmp_path / "bpe.model").write_text(content)
    with pytest.raises(DataError, match=f"bpe.model.*{token}"):
        text_models.load(tmp_path / "bpe.model")
