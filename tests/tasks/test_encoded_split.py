"""Tests of the cache of image tokens: every harm to its file is found, and the file is written again."""

import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax.data.sources.source import DataOptions
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.tasks import encoded_split
from dalle_jax.tasks.encoded_split import tokens_of_split

TOKENIZER = DVAETokenizer(DVAEOptions(image_size=16, vocab_size=24, hidden=8, groups=1, blocks_per_group=1))
SHAPE, VOCAB = (3, 4), 24  # of `pack`


@pytest.fixture
def options(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):  # one is held out
        Image.fromarray(np.full((16, 16, 3), 80 * i, np.uint8)).save(folder / f"{i}.png")
    return DataOptions(source="folder", path=str(folder), image_size=16)


@pytest.fixture
def encoded(monkeypatch):
    """Counts the calls of `encode_split`, which returns fixed tokens of the right shape."""
    calls = []

    def encode_split(options, *_):
        calls.append(options)
        return np.arange(2 * 256, dtype=np.int32).reshape(2, 256) % VOCAB

    monkeypatch.setattr(encoded_split, "encode_split", encode_split)
    monkeypatch.setattr(DVAETokenizer, "grid", lambda *_: (16, 16))
    return calls


HARMS = {
    "flipped low bit": lambda content: content[:300] + bytes([content[300] ^ 1]) + content[301:],
    "flipped high bit": lambda content: content[:301] + bytes([content[301] ^ 128]) + content[302:],
    "flipped in the checksum": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "flipped in the shape": lambda content: content.replace(b"(2, 256)", b"(1, 256)"),
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "without a checksum": lambda content: content[: content.rindex(b'{"key"')],
    "brackets": lambda content: content[: content.rindex(b'{"key"')] + b'{"key": ' + b"[" * 100_000,
    "more": lambda content: content + b"more",
    "two rows swapped": lambda content: content[:128] + content[1152:2176] + content[128:1152] + content[2176:],
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_a_damaged_cache_is_written_again(options, encoded, tmp_path, caplog, harm):
    params = {"w": np.zeros(1, np.float32)}
    get = lambda: tokens_of_split(options, "train", TOKENIZER, params, [tmp_path])
    expected = get()
    (file,) = tmp_path.glob("tokens-*.npy")
    content = file.read_bytes()
    assert harm(content) != content
    file.write_bytes(harm(content))
    np.testing.assert_array_equal(get(), expected)
    assert len(encoded) == 2 and file.read_bytes() == content
    assert sum(str(file) in record.getMessage() for record in caplog.records if record.levelname == "WARNING") == 1
    get()
    assert len(encoded) == 2


def test_a_cache_of_another_tokenizer_is_not_used(options, encoded, tmp_path):
    get = lambda value: tokens_of_split(options, "train", TOKENIZER, {"w": np.full(1, value)}, [tmp_path])
    get(0.0)
    (first,) = tmp_path.glob("tokens-*.npy")
    get(1.0)
    (second,) = set(tmp_path.glob("tokens-*.npy")) - {first}
    second.write_bytes(first.read_bytes())
    get(1.0)
    assert len(encoded) == 3 and second.read_bytes() != first.read_bytes()


@pytest.mark.parametrize(
    "tokens, word",
    [
        (np.zeros((3, 5), np.int32), r"\[3, 5\]"),
        (np.zeros(SHAPE, np.int64), "int64"),
        (np.full(SHAPE, -1, np.int32), "24"),
        (np.full(SHAPE, VOCAB, np.int32), "24"),
    ],
)
def test_tokens_that_do_not_fit(tokens, word):
    good = np.zeros(SHAPE, np.int32)
    np.testing.assert_array_equal(encoded_split._unpacked(encoded_split._packed(good, "k"), "k", SHAPE, VOCAB), good)
    with pytest.raises(ValueError, match=word):
        encoded_split._unpacked(encoded_split._packed(tokens, "k"), "k", SHAPE, VOCAB)


def test_numpy_reads_a_cache(options, encoded, tmp_path):
    tokens = tokens_of_split(options, "train", TOKENIZER, jax.numpy.zeros(1), [tmp_path])
    (file,) = tmp_path.glob("tokens-*.npy")
    np.testing.assert_array_equal(np.load(file), tokens)
