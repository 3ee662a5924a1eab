import collections
import itertools

import numpy as np
import pytest
from absl import logging

from dalle_jax.data.text import TextModel, encode_captions, normalize
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.token_layout import PaddedIds

CAPTIONS = [
    f"A {size} {color} {shape} above a Black square, on a {ground} background"
    for size, color, shape, ground in itertools.product(
        ("small", "big"), ("red", "blue", "green"), ("circle", "triangle", "cross"), ("white", "gray")
    )
]


@pytest.fixture(scope="module")
def model():
    return TextModel.train(CAPTIONS, vocab_size=4096)


def pieces(model, caption, **kwargs):
    return model.encode(caption, max_length=1000, **kwargs)[0]


def test_normal_form():
    assert normalize("  A\tRED\n ﬁre\u00a0\u2581 truck\x00 ") == "a red fire truck"
    assert normalize("x\ud800y") == "x y"
    assert normalize(" \n\u2581\t") == ""


def test_round_trip_is_lower_case(model):
    for caption in CAPTIONS:
        assert model.decode(pieces(model, caption)) == normalize(caption)
    assert pieces(model, "A RED circle") == pieces(model, " a red  CIRCLE ")


def test_small_corpus_gets_a_small_vocabulary(model):
    assert 30 < model.vocab_size < 1000
    ids = {i for caption in CAPTIONS for i in pieces(model, caption)}
    assert max(ids) < model.vocab_size and min(ids) > 0  # nothing unknown: every letter is in the vocabulary


def test_training_repeats_itself_and_loads(model, tmp_path):
    path = tmp_path / "new" / "sentencepiece.model"
    again = TextModel.train(iter(CAPTIONS), vocab_size=4096, path=path)
    loaded = TextModel.load(path)
    for other in (again, loaded):
        assert [pieces(other, c) for c in CAPTIONS] == [pieces(model, c) for c in CAPTIONS]
    assert path.read_bytes() == model.__reduce__()[1][0]
    assert sorted(x.name for x in path.parent.iterdir()) == ["sentencepiece.model", "sentencepiece.model.sha256"]


def test_empty_text_gives_nothing(model):
    for text in ("", "   ", "\n\t\x00"):
        assert model.encode(text, max_length=8) == ([], False)
        assert model.encode(text, max_length=8, dropout=0.1, seed=0) == ([], False)


def test_truncation_is_reported(model):
    full = pieces(model, CAPTIONS[0])
    assert model.encode(CAPTIONS[0], max_length=len(full)) == (full, False)
    assert model.encode(CAPTIONS[0], max_length=len(full) - 1) == (full[:-1], True)


def test_dropout_walks_the_same_merges_as_sentencepiece(model):
    """With a dropout too small to occur, our merge loop must give sentencepiece's segmentation."""
    odd = ["zebra quux ąę ą", "redcircle whitebackgroundsquare", "ąa ę", "small,small", "x" * 30]
    for caption in CAPTIONS + odd:
        assert pieces(model, caption, dropout=1e-12, seed=1) == pieces(model, caption)


def test_dropout_is_seeded_and_loses_no_text(model):
    plain = pieces(model, CAPTIONS[0])
    draws = [pieces(model, CAPTIONS[0], dropout=0.3, seed=seed) for seed in range(20)]
    assert draws == [pieces(model, CAPTIONS[0], dropout=0.3, seed=seed) for seed in range(20)]
    assert len({tuple(ids) for ids in draws}) > 10
    for ids in draws:
        assert len(ids) >= len(plain)
        assert model.decode(ids) == normalize(CAPTIONS[0])


def test_dropout_rate_on_a_single_merge():
    """ "▁" + "a" is the only merge, so it must be lost at exactly the requested rate."""
    model = TextModel.train(["a"] * 10, vocab_size=50)
    split = collections.Counter(len(pieces(model, "a", dropout=0.25, seed=seed)) for seed in range(4000))
    assert set(split) == {1, 2}
    assert split[2] / 4000 == pytest.approx(0.25, abs=0.03)


def test_dropout_needs_a_seed_and_a_probability(model):
    with pytest.raises(ValueError, match="seed"):
        model.encode("a", max_length=4, dropout=0.1)
    with pytest.raises(ValueError, match="1.0"):
        model.encode("a", max_length=4, dropout=1.0, seed=0)


def test_padding_goes_through_the_layout(model):
    padded = PaddedIds(model.vocab_size, 64)
    ids = pieces(model, CAPTIONS[0])
    text = padded.pad(ids)
    np.testing.assert_array_equal(text[: len(ids)], ids)
    np.testing.assert_array_equal(text[len(ids) :], model.vocab_size + np.arange(len(ids), 64))


def test_missing_or_damaged_model_is_a_clear_error(tmp_path, model):
    with pytest.raises(DataError, match="absent.model"):
        TextModel.load(tmp_path / "absent.model")
    damaged = tmp_path / "damaged.model"
    damaged.write_bytes(model.__reduce__()[1][0][:-1])
    with pytest.raises(DataError, match="damaged.model"):
        TextModel.load(damaged)
    damaged.write_bytes(b"")
    with pytest.raises(DataError, match="damaged.model"):
        TextModel.load(damaged)


def test_training_errors():
    with pytest.raises(DataError, match="caption"):
        TextModel.train(["", "  "], vocab_size=100)
    with pytest.raises(ConfigError, match="text.vocab_size"):
        TextModel.train(CAPTIONS, vocab_size=5)


def test_a_truncated_caption_is_named_once(model, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: warnings.append(text % values))
    for _ in range(2):
        (ids,) = encode_captions(model, ["a red circle above a blue square, twice"], 3)
        assert len(ids) == 3
    assert len(warnings) == 1 and "twice" in warnings[0]


# -- letters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines(monkeypatch):
    found = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: found.append(text % values))
    return found


def test_invisible_characters_are_dropped(model):
    invisible = "\ufeff\u200b\u200c\u200d\u2060\u00ad\u200e\u202a\u2066\ufe0f"
    assert normalize(invisible.join(" A Red circle")) == "a red circle"
    assert normalize(invisible) == ""
    assert pieces(model, invisible.join("a red circle")) == pieces(model, "a red circle")
    assert normalize("\U0001f468\u200d\U0001f373") == "\U0001f468\U0001f373"


def test_ascii_text_has_the_same_normal_form_as_ever():
    text = "".join(chr(code) for code in range(32, 127)) + "'\"-"
    assert normalize(text) == " ".join(text.lower().split())


@pytest.mark.parametrize("known, given", [("'", "’"), ("’", "'"), ('"', "“”"), ("-", "–—‐‑−"), ("«", '"')])
def test_a_sign_in_another_spelling_is_known(known, given):
    captions = [f"the dog{known}s bone a{known}b"] * 3
    trained = TextModel.train(captions, vocab_size=60)
    for letter in given:
        caption = captions[0].replace(known, letter)
        assert trained.unknown_letters(caption) == ""
        assert pieces(trained, caption) == pieces(trained, captions[0])
        assert pieces(trained, caption, dropout=0.5, seed=1) == pieces(trained, captions[0], dropout=0.5, seed=1)


def test_a_vocabulary_with_both_spellings_keeps_them_apart():
    trained = TextModel.train(["it's it’s"] * 3, vocab_size=60)
    assert pieces(trained, "it's") != pieces(trained, "it’s")


def test_unknown_letters_are_listed_once(model, lines):
    captions = ["a red circle 猫", "a Кот, 猫", "a \U0001f600 square"]
    assert model.unknown_letters(captions[1]) == "кот猫"
    for _ in range(2):
        assert len(encode_captions(model, captions, 40)) == 3
    assert len(lines) == 1 and all(letter in lines[0] for letter in ("猫", "к", "о", "т", "\U0001f600"))
    assert encode_captions(model, ["a red circle"], 40) and len(lines) == 1


@pytest.mark.parametrize("caption", ["猫", "Кот", "\U0001f600", "猫 , Кот", "ж" * 500])
def test_a_caption_of_unknown_letters_is_rejected(model, caption):
    with pytest.raises(DataError, match=caption[:3]):
        encode_captions(model, ["a red circle", caption], 8)


def test_every_letter_of_the_vocabulary_is_known(model):
    for caption in CAPTIONS:
        assert model.unknown_letters(caption) == ""
    assert TextModel.train(["猫 кот"], vocab_size=60).unknown_letters("Кот 猫") == ""


def test_encoding_of_ordinary_captions_is_golden(model):
    """Older text models encode ordinary captions as before: the ids are sentencepiece's of the lower-case text."""
    for caption in [*CAPTIONS, "Zebra, quux? 17% «ä»", "it's"]:
        assert pieces(model, caption) == model._processor.encode(caption.lower())
