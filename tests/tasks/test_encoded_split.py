"""Tests of a split that is encoded in advance: right tokens, only once, again where they are damaged or stale."""

import os
import pickle

import flax.linen as nn
import jax
import numpy as np
import pytest
from PIL import Image

from dalle_jax.data import token_store
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.tasks import encoded_split
from dalle_jax.tasks.encoded_split import encode_parts, given_tokens, tokens_of_split
from dalle_jax.token_layout import PaddedIds

TOKENIZER = DVAETokenizer(DVAEOptions(image_size=16, vocab_size=24, hidden=8, groups=1, blocks_per_group=1))
PIXELS = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
BROKEN = 3  # this file is no image


@pytest.fixture(scope="module")
def params():
    shapes, rng = nn.meta.unbox(jax.eval_shape(TOKENIZER.init, jax.random.key(0))), np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), shapes)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(encoded_split, "PART", 4)
    monkeypatch.setattr(encoded_split, "BATCH", 2)


@pytest.fixture
def options(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"image {i}")
    (folder / f"{BROKEN}.png").write_bytes(b"no image")
    return DataOptions(source="folder", path=str(folder), image_size=16, train_split="all", eval_split="all")


@pytest.fixture
def encoded(monkeypatch):
    """The parts that were encoded, in order."""
    parts = []

    def encode(*args):
        for part, made in encode_parts(*args):
            parts.append(part)
            yield part, made

    monkeypatch.setattr(encoded_split, "encode_parts", encode)
    return parts


def test_tokens_are_those_of_the_images(options, params, tmp_path, encoded):
    store = tokens_of_split(options, "all", TOKENIZER, params, [tmp_path])
    expected = np.asarray(TOKENIZER.encode(params, PIXELS)).reshape(7, -1)
    assert len(store) == 7 and store.dtype == np.uint16 and encoded == [0, 1]
    for index in set(range(7)) - {BROKEN}:
        np.testing.assert_array_equal(store.row(index), expected[index])
    with pytest.raises(token_store.UnreadableExample, match="unreadable image"):
        store.row(BROKEN)
    tokens_of_split(options, "all", TOKENIZER, params, [tmp_path])
    tokens_of_split(options, "all", TOKENIZER, params, [tmp_path / "new", tmp_path])
    assert encoded == [0, 1]


def test_batches_of_tokens_are_those_of_images(options, params, tmp_path):
    """Also with an unreadable image: the same example replaces it, and it is counted under the same reason."""
    model = TextModel.train([f"image {i}" for i in range(7)], vocab_size=60)
    captions = PaddedIds(model.vocab_size, 8)
    how = dict(split="all", train=True, batch_size=4, seed=3)
    images = iter(Pipeline(options, model, captions, **how))
    ours = [next(images) for _ in range(6)]
    store = tokens_of_split(options, "all", TOKENIZER, params, [tmp_path])
    (tmp_path / "images" / "0.png").write_bytes(b"")  # no image is read any more
    tokens = Pipeline(options, model, captions, tokens=store, **how)
    make = pickle.loads(pickle.dumps(tokens._make))  # as a worker process gets it
    for number, (batch, other) in enumerate(zip(ours, tokens.batches(), strict=False)):
        assert set(other) == {"tokens", "index", "text"} and BROKEN not in other["index"]
        np.testing.assert_array_equal(batch["index"], other["index"])
        np.testing.assert_array_equal(batch["text"], other["text"])
        np.testing.assert_array_equal(other["tokens"], [store.row(int(index)) for index in other["index"]])
        np.testing.assert_array_equal(make(number)[0]["tokens"], other["tokens"])
    assert tokens.skipped() == {"unreadable image": 1}


def test_only_damaged_parts_are_encoded_again(options, params, tmp_path, encoded, caplog):
    get = lambda: tokens_of_split(options, "all", TOKENIZER, params, [tmp_path])
    (file,) = get().folder.glob("part-00001.npy")
    content = file.read_bytes()
    file.write_bytes(content[:-30] + b"x" + content[-29:])
    get()
    assert encoded == [0, 1, 1] and file.read_bytes() == content
    assert sum("part 1" in record.getMessage() for record in caplog.records if record.levelname == "WARNING") == 1
    file.unlink()
    get()
    assert encoded == [0, 1, 1, 1] and file.read_bytes() == content


def test_other_images_or_another_tokenizer_are_encoded_again(options, params, tmp_path, encoded):
    get = lambda params: tokens_of_split(options, "all", TOKENIZER, params, [tmp_path]).folder
    first = get(params)
    (tmp_path / "images" / "1.txt").write_text("another caption")
    assert get(params) == first
    second = get(jax.tree.map(lambda x: x + 1, params))
    os.utime(tmp_path / "images" / "1.png", (0, 0))
    assert len({first, second, get(params)}) == 3 and encoded == [0, 1] * 3


def test_images_that_may_change_unseen_are_not_stored(options, params, tmp_path, monkeypatch):
    source = open_source(options, "all")
    source.image_identity = None
    monkeypatch.setattr(encoded_split, "open_source", lambda *_: source)
    tokens = tokens_of_split(options, "all", TOKENIZER, params, [tmp_path])
    np.testing.assert_array_equal(tokens.row(5), np.asarray(TOKENIZER.encode(params, PIXELS[5:6])).reshape(-1))
    with pytest.raises(token_store.UnreadableExample):
        tokens.row(BROKEN)
    assert not list(tmp_path.glob("tokens-*"))


def test_given_tokens_must_be_those_of_the_training(options, params, tmp_path):
    store = tokens_of_split(options, "all", TOKENIZER, params, [tmp_path])
    given = lambda options=options, params=params: given_tokens(store.folder, options, "all", TOKENIZER, params)
    np.testing.assert_array_equal(given().row(6), store.row(6))
    with pytest.raises(ConfigError, match="data_tokens.*tokenizer"):
        given(params=jax.tree.map(lambda x: x + 1, params))
    with pytest.raises(ConfigError, match="data_tokens.*images"):
        given(options=DataOptions(**{**vars(options), "image_size": 32}))
    (store.folder / "part-00001.npy").unlink()
    with pytest.raises(ConfigError, match="1 of 2 parts"):
        given()
    with pytest.raises(ConfigError, match="data_tokens.*images"):
        os.utime(tmp_path / "images" / "1.png", (0, 0))
        given()
