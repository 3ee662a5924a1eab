"""OpenAI's byte pairs give the same ids as open_clip's reader, from each of the three kinds of file."""

import builtins
import gzip
import importlib.util
import json
import pathlib

import pytest

from dalle_jax.data import byte_pairs
from dalle_jax.data.byte_pairs import BytePairs
from dalle_jax.errors import DataError

CAPTIONS = [
    "a photo of a cat",
    "A   PHOTO of\ta\nCat!!",
    "it's 1984: don't they'll we've I'm you're he'd",
    "naïve café, 東京の猫 🐈 straße",
    "x" * 300,
    "ends with <|endoftext|> inside",
    "",
]


@pytest.fixture(scope="module")
def package():
    """The folder of open_clip, which includes the vocabulary."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        pytest.skip("needs open_clip_torch==3.3.0")
    return pathlib.Path(found.origin).parent


@pytest.fixture(scope="module")
def theirs(package):
    """open_clip's tokenizer, imported without the rest of the package."""
    pytest.importorskip("torch", reason="needs torch==2.13.0")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", package / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer(context_length=77)


@pytest.fixture(scope="module")
def official(package):
    pytest.importorskip("tokenizers", reason="needs tokenizers (pip install tokenizers)")
    return package / "bpe_simple_vocab_16e6.txt.gz"


@pytest.fixture(scope="module")
def model(official):
    return BytePairs(official)


def test_the_same_ids_as_open_clip(theirs, model):
    assert model.end_id == 49_407
    for caption in CAPTIONS:
        ids, truncated = model.encode(caption, max_length=10_000)
        assert ids == ([49_406, *theirs.encode(caption)] if caption else []) and not truncated, caption
    rows = theirs(CAPTIONS[:4]).tolist()
    for caption, row in zip(CAPTIONS[:4], rows):
        ids, _ = model.encode(caption, max_length=76)
        assert [*ids, 49_407] == row[: len(ids) + 1]


def test_no_caption_gives_a_special_token(model, tmp_path):
    """The original would ignore everything after the token.

    Hugging Face's files request special tokens, padding, truncation, and the end token for unknown characters.
    """
    import tokenizers

    model.save(tmp_path / "ours.json")
    requesting = tokenizers.Tokenizer.from_file(str(tmp_path / "ours.json"))
    requesting.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    requesting.enable_padding(length=20, pad_id=49_407)
    requesting.enable_truncation(7)
    requesting.save(str(tmp_path / "requesting.json"))
    spelled = "a <|endoftext|> cat <|startoftext|>"
    assert {49_406, 49_407} <= set(requesting.encode(spelled).ids)
    for one in (model, BytePairs(tmp_path / "requesting.json")):
        ids, truncated = one.encode(spelled, max_length=100)
        assert not truncated and ids[0] == 49_406 and {49_406, 49_407}.isdisjoint(ids[1:])
        parts = ("a", "<|", "endoftext", "|>", "cat", "<|", "startoftext", "|>")
        assert ids[1:] == [i for part in parts for i in one.encode(part, max_length=100)[0][1:]]

    damaged = json.loads((tmp_path / "ours.json").read_text())
    damaged["model"]["unk_token"] = "<|endoftext|>"
    for letter in ("z", "z</w>"):
        damaged["model"]["vocab"][letter + "?"] = damaged["model"]["vocab"].pop(letter)
    damaged["model"]["merges"] = [pair for pair in damaged["model"]["merges"] if "z" not in "".join(pair)]
    (tmp_path / "damaged.json").write_text(json.dumps(damaged))
    assert BytePairs(tmp_path / "damaged.json").encode("z", max_length=100)[0] == []


def test_long_captions_are_truncated(model):
    whole, _ = model.encode(CAPTIONS[2], max_length=100)
    ids, truncated = model.encode(CAPTIONS[2], max_length=5)
    assert truncated and ids == whole[:5]


def test_all_kinds_of_file_are_the_same(model, official, tmp_path):
    model.save(tmp_path / "tokenizer.json")
    vocab, pairs = byte_pairs._read_merges(byte_pairs.epath.Path(official))
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pairs) + "\n")
    for path in (tmp_path / "tokenizer.json", tmp_path):
        other = BytePairs(path)
        for caption in CAPTIONS:
            assert other.encode(caption, max_length=77) == model.encode(caption, max_length=77)


def test_files_of_another_kind_are_errors(tmp_path):
    pytest.importorskip("tokenizers", reason="needs tokenizers (pip install tokenizers)")
    with pytest.raises(DataError, match="none.json"):
        BytePairs(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="other.json"):
        BytePairs(tmp_path / "other.json")
    (tmp_path / "other.gz").write_bytes(gzip.compress(b"no merges\nhere at all"))
    with pytest.raises(DataError, match="other.gz"):
        BytePairs(tmp_path / "other.gz")
    with pytest.raises(DataError, match="vocab.json"):
        BytePairs(tmp_path)


def test_without_the_package(tmp_path, monkeypatch):
    def missing(name, *rest):
        if name == "tokenizers":
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DataError, match=r"\[clip\]"):
        BytePairs(tmp_path / "tokenizer.json")
