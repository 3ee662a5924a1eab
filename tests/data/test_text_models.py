"""Text models of published priors: labels and tokenizer.json, and the recognition of each kind by its content."""

import json
import pickle

import pytest

from dalle_jax.checkpoints import workdir
from dalle_jax.data import text_models
from dalle_jax.data.json_tokenizer import JsonTokenizer
from dalle_jax.data.labels import Labels
from dalle_jax.data.text import CaptionModel, TextModel, encode_captions
from dalle_jax.errors import DataError

NAMES = ["tench, Tinca tinca", "goldfish", "great white shark"]


def encode(model, text):
    return model.encode(text, max_length=64)[0]


# -- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["class: 2", "Class 2", "label=2", "2", " class:2 ", "Great  White Shark"])
def test_spellings_of_a_class(text):
    assert encode(Labels(3, NAMES), text) == [2]


def test_any_of_several_names():
    model = Labels(3, NAMES)
    assert encode(model, "Tinca tinca") == encode(model, "tench") == encode(model, "tench, tinca tinca") == [0]
    assert model.decode([1, 0]) == "goldfish tench, Tinca tinca" and Labels(3).decode([1]) == "class: 1"
    assert encode(model, " ") == [] and model.unknown_letters("ж") == "ж" and model.unknown_letters("tench") == ""


def test_the_words_of_a_folders_name():
    """ "Golden retriever" means the folder golden_retriever_2. Words that several folders share mean none of them."""
    model = Labels(4, ["golden_retriever_2", "red-fox_1", "red-fox_2", "owl"])
    assert encode(model, "Golden retriever") == [0] and encode(model, "red-fox_2") == [2]
    with pytest.raises(DataError, match="red fox"):
        encode(model, "red fox")
    with pytest.raises(DataError, match="99"):
        encode(Labels(2, ["7", "owl"]), "99")
    earlier = Labels(2, ["class", "golden retriever"])  # of a run whose labels were cleaned
    assert encode(earlier, "class_1") == encode(earlier, "class_2") == [0] and encode(earlier, "golden_retriever") == [
        1
    ]


@pytest.mark.parametrize(
    ("text", "token"), [("class: 3", "class: 2"), ("goldfisch", "goldfish"), ("class: -1", "class: 0")]
)
def test_no_such_class(text, token):
    with pytest.raises(DataError, match=token):
        encode_captions(Labels(3, NAMES), [text], 1)


@pytest.mark.parametrize("names", [NAMES[:2], ["a", "b", ","], ["a", " ", "c"]])
def test_wrong_names(names):
    with pytest.raises(DataError, match=r"2 classes|class [12]"):
        Labels(3, names)


# -- tokenizer.json -----------------------------------------------------------------------------------------------

CAPTIONS = ["A painting of a cat", "two dogs, one cat", "the cat's hat"] * 3


@pytest.fixture
def original():
    """The tokenizer that minDALL-E's code builds, trained on a few captions."""
    tokenizers = pytest.importorskip("tokenizers", reason="published text models need tokenizers")
    made = tokenizers.CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    made.train_from_iterator(CAPTIONS, vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    return made


@pytest.fixture
def folder(tmp_path, original):
    original.save_model(str(tmp_path), "bpe-16k")
    return tmp_path


def test_a_folder_of_vocabulary_and_merges_is_the_original(folder, original):
    original.add_special_tokens(["[PAD]"])
    model = JsonTokenizer.of_char_bpe(folder)
    assert model.vocab_size == original.token_to_id("[PAD]") == original.get_vocab_size() - 1
    for text in (*CAPTIONS[:3], "A CAT!", "thé cat", "zebra"):
        assert encode(model, text) == original.encode(text).ids, text
    assert model.encode("a cat's hat", max_length=2) == (original.encode("a cat's hat").ids[:2], True)
    assert model.decode(encode(model, "Two dogs")) == "two dogs"


def test_unknown_letters_and_spelled_special_tokens(folder):
    model = JsonTokenizer.of_char_bpe(folder)
    assert model.unknown_letters("a жcat ∆") == "ж∆" and model.unknown_letters("a cat") == ""
    assert max(encode(model, "[PAD] [PAD]")) < model.vocab_size
    assert encode(model, " ") == []


@pytest.mark.parametrize("change", ["none", "padding not last", "no padding", "cut"])
def test_a_tokenizer_json(tmp_path, folder, original, change):
    if change != "no padding":
        original.add_special_tokens(["[PAD]"])
    if change == "padding not last":
        original.add_special_tokens(["[MASK]"])
    content = original.to_str() if hasattr(original, "to_str") else original._tokenizer.to_str()
    path = tmp_path / "any name"
    path.write_text(content[: len(content) // 2] if change == "cut" else content)
    if change == "none":
        model = text_models.load(path)
        assert isinstance(model, JsonTokenizer) and encode(model, "a cat") == original.encode("a cat").ids
    else:
        with pytest.raises(DataError, match="any name"):
            text_models.load(path)


@pytest.mark.parametrize("missing", ["bpe-16k-vocab.json", "bpe-16k-merges.txt"])
def test_a_folder_without_one_of_the_files(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(DataError, match=missing.rpartition("-")[2]):
        JsonTokenizer.of_char_bpe(folder)


# -- all kinds ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["sentencepiece", "labels", "tokenizer.json"])
def model(request, folder):
    made = {"sentencepiece": lambda: TextModel.train(CAPTIONS, 40), "labels": lambda: Labels(3, [*"ab", "a cat"])}
    return made.get(request.param, lambda: JsonTokenizer.of_char_bpe(folder))()


def test_a_workdir_keeps_a_text_model_of_any_kind(tmp_path, model):
    assert isinstance(model, CaptionModel)
    run = tmp_path / "run"
    workdir.save_text_model(run, model)
    assert workdir.text_model_path(run).name == model.file_name
    for again in (workdir.load_text_model(run), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model) and again.vocab_size == model.vocab_size
        assert encode(again, "a cat") == encode(model, "a cat") != []
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == workdir.text_model_path(run).read_bytes()


def test_models_without_dropout_reject_it(model):
    if not model.takes_dropout:
        with pytest.raises(ValueError, match=r"0\.1"):
            model.encode("a cat", max_length=9, dropout=0.1, seed=0)


@pytest.mark.parametrize(
    "content", ["{", "{}", '{"kind": "labels"}', json.dumps({"kind": "labels", "count": 2, "names": [3]})]
)
def test_damaged_files(tmp_path, content):
    (tmp_path / "text.model").write_text(content)
    with pytest.raises(DataError, match=r"text\.model"):
        text_models.load(tmp_path / "text.model")
    with pytest.raises(DataError, match="nothing"):
        text_models.load(tmp_path / "nothing")
