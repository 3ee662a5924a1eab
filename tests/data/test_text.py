import collections
import itertools

import numpy as np
import pytest
from absl import logging

from dalle_jax.data.text import TextModel, encode_captions, normalize
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.token_layout import TokenLayout

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
    assert [entry.name for entry in path.parent.iterdir()] == ["sentencepiece.model"]


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
    layout = TokenLayout(model.vocab_size, 16, 64, 2, 2)
    ids = pieces(model, CAPTIONS[0])
    text = layout.pad_text(ids)
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
