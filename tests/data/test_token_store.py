"""Tests of stored image tokens: rows come back, and every harm to a part is found before a wrong token is used."""

import dataclasses
import pickle

import numpy as np
import pytest

from dalle_jax.data import token_store
from dalle_jax.data.sources.record import UnreadableExample
from dalle_jax.data.token_store import Description, TokensInMemory, TokenStore
from dalle_jax.errors import DamagedError, DataError

EXAMPLES, TOKENS, VOCAB = 11, 3, 24
UNREADABLE = {5: ("missing file", "e.png", "gone")}


def described(**changes):
    usual = dict(images="i", image_size=16, image_key="image", fit="crop", tokenizer="t", parameters="p")
    return Description(**{**usual, "examples": EXAMPLES, "tokens": TOKENS, "vocab_size": VOCAB, "part": 4, **changes})


def rows(vocab=VOCAB):
    return np.random.default_rng(0).integers(0, vocab, (EXAMPLES, TOKENS), np.int32)


def write(folder, description=None, tokens=None):
    store = TokenStore(folder, description or described())
    tokens = rows() if tokens is None else tokens
    store.write_description()
    for part in range(store.part_count):
        examples = store.examples_of(part)
        store.write(part, tokens[examples.start : examples.stop], UNREADABLE)
    return store


@pytest.mark.parametrize("vocab, dtype", [(24, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_rows_come_back_in_the_smallest_type(tmp_path, vocab, dtype):
    tokens = rows(vocab)
    tokens[0, 0] = vocab - 1
    store = write(tmp_path, described(vocab_size=vocab), tokens)
    store = pickle.loads(pickle.dumps(store))
    assert store.part_count == 3 and len(store) == EXAMPLES and not store.faults() and not store.faults(whole=False)
    for index in set(range(EXAMPLES)) - set(UNREADABLE):
        assert store.row(index).dtype == dtype
        np.testing.assert_array_equal(store.row(index), tokens[index])
    np.testing.assert_array_equal(np.load(tmp_path / "part-00000.npy"), tokens[:4])


def test_an_unreadable_example_raises_as_when_it_was_read(tmp_path):
    for tokens in (write(tmp_path), TokensInMemory(rows(), UNREADABLE)):
        with pytest.raises(UnreadableExample) as raised:
            tokens.row(5)
        assert (raised.value.reason, raised.value.name, raised.value.detail) == UNREADABLE[5]
        assert tokens.row(4).shape == (TOKENS,)


def test_more_parts_than_may_be_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "_OPEN", 2)
    store = write(tmp_path)
    for index in [0, 4, 8, 0, 9, 6, 1] * 3:
        np.testing.assert_array_equal(store.row(index), rows()[index])
    assert len(store._parts) == 2


def flip(content, place, bit=1):
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


ROWS = 128  # bytes of numpy's header
HARMS = {
    "flipped low bit": lambda c: flip(c, ROWS),
    "flipped high bit": lambda c: flip(c, ROWS + 1, 128),
    "two rows swapped": lambda c: c[:ROWS] + c[ROWS + 6 : ROWS + 12] + c[ROWS : ROWS + 6] + c[ROWS + 12 :],
    "two rows and their sums swapped": lambda c: (
        c[:ROWS] + c[ROWS + 6 : ROWS + 12] + c[ROWS : ROWS + 6] + c[ROWS + 12 : ROWS + 24]
        + c[ROWS + 28 : ROWS + 32] + c[ROWS + 24 : ROWS + 28] + c[ROWS + 32 :]
    ),
    "flipped in a sum": lambda c: flip(c, ROWS + 24),
    "another shape": lambda c: c.replace(b"(4, 3)", b"(3, 4)"),
    "half": lambda c: c[: len(c) // 2],
    "empty": lambda c: b"",
    "zeros": lambda c: bytes(len(c)),
    "without its end": lambda c: c[: c.rindex(b'{"key"')],
    "brackets": lambda c: c[: c.rindex(b'{"key"')] + b'{"key": ' + b"[" * 100_000,
    "another list": lambda c: c.replace(b'"unreadable": {}', b'"unreadable": []'),
    "a readable example is called unreadable": lambda c: c.replace(
        b'"unreadable": {}', b'"unreadable": {"0": ["missing file", "a", ""]}'
    ),
}  # fmt: skip


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_harms_are_found(tmp_path, harm):
    store = write(tmp_path)
    file = tmp_path / "part-00000.npy"
    content = file.read_bytes()
    assert harm(content) != content
    file.write_bytes(harm(content))
    assert set(store.faults()) == {0}
    with pytest.raises(DamagedError, match="part-00000"):
        TokenStore(tmp_path, described()).row(0)
    np.testing.assert_array_equal(store.row(4), rows()[4])


@pytest.mark.parametrize(
    "harm",
    [lambda c: c + b"more", lambda c: c.replace(b'"sha256": "', b'"sha256": "0'), lambda c: flip(c, ROWS + 18)],
    ids=["more", "checksum", "last row"],
)
def test_harms_that_only_the_checksum_shows(tmp_path, harm):
    store = write(tmp_path)
    file = tmp_path / "part-00000.npy"
    file.write_bytes(harm(file.read_bytes()))
    assert set(store.faults()) == {0}


def test_tokens_outside_of_the_vocabulary(tmp_path):
    tokens = rows()
    tokens[9, 1] = VOCAB
    assert set(write(tmp_path, tokens=tokens).faults()) == {2}


def test_parts_that_are_missing_misplaced_or_of_other_tokens(tmp_path):
    store, other = write(tmp_path / "a"), write(tmp_path / "b", described(parameters="q"))
    (tmp_path / "a" / "part-00000.npy").unlink()
    (tmp_path / "b" / "part-00001.npy").rename(tmp_path / "a" / "part-00001.npy")
    assert store.faults()[0] == "missing" and "other" in store.faults()[1] and 2 not in store.faults()
    part = (tmp_path / "b" / "part-00000.npy").read_bytes()
    (tmp_path / "b" / "part-00001.npy").write_bytes(part)
    assert "other" in other.faults(whole=False)[1]
    (tmp_path / "b" / "part-00002.npy").unlink()
    (tmp_path / "b" / "part-00002.npy").mkdir()
    assert "no file" in other.faults(whole=False)[2]


def test_the_description_comes_back(tmp_path):
    write(tmp_path)
    assert token_store.exists(tmp_path) and token_store.read_description(tmp_path) == described()
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(DamagedError, match="tokens.json"):
        token_store.read_description(tmp_path)
    (tmp_path / "tokens.json.sha256").unlink()
    with pytest.raises(DataError, match="tokens.json"):
        token_store.read_description(tmp_path)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Description)])
def test_every_difference_has_words_and_another_key(name):
    value = getattr(described(), name)
    other = described(**{name: value + 1 if isinstance(value, int) else f"{value}x"})
    assert len(token_store.differences(described(), other)) == 1 and other.key != described().key
    assert not token_store.differences(described(), described())


def test_nothing_is_read_from_object_storage_to_list_the_parts(tmp_path, monkeypatch):
    store = write(tmp_path)
    (tmp_path / "part-00001.npy").unlink()
    monkeypatch.setattr(token_store, "is_remote", lambda _: True)
    remote = TokenStore(tmp_path, described())
    np.testing.assert_array_equal(remote.row(0), rows()[0])  # read whole, not mapped
    monkeypatch.setattr(TokenStore, "_read", None)
    assert remote.faults(whole=False) == {1: "missing"}
    assert TokenStore(tmp_path / "none", described()).faults(whole=False).keys() == {0, 1, 2}
    assert store.part_count == 3
