"""The text model of DALL-E mini: the ids of min-dalle's code, blanks and unknown letters, and files that are none."""

import json
import pickle
import sys

import dalle_mini_originals
import pytest
from dalle_mini_originals import MERGES, VOCABULARY
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.data import text_models
from dalle_jax.data.dalle_mini_text import DalleMiniText
from dalle_jax.data.text import encode_captions
from dalle_jax.errors import DataError

MODEL = DalleMiniText(VOCABULARY, MERGES, 150)
# Subwords between begin and end; U+0120 is written as "G".
CAPTIONS = {
    "a cat": ["Ga", "Gcat"],
    "The  CATS": ["Gthe", "Gcats"],
    "the\u00e9 caf\u00e9": ["Gthe", "G", "ca", "f"],
    "\U0001f431": ["Gcat", "_face"],  # cat_face
    "10 100 1": ["G10", "G10", "0", "G1"],
    "red-eyed, red!": ["Gred", "-", "e", "y", "e", "d", ",", "Gred", "!"],
    "aaaa": ["Ga", "aa", "a"],
    "\u732b": [],
    "a\tb": ["Ga", "<unk>", "b"],
    "<pad> </s>": [*"G<pad>", *"G</s>"],
    "\u212aE": ["G", "k", "e"],  # the sign of Kelvin in lower case is k
}


def encode(text, length=999):
    return MODEL.encode(text, max_length=length)[0]


@pytest.mark.parametrize("caption", CAPTIONS)
def test_ids(caption):
    """Between begin and end, cut off at the end."""
    expected = [0, *(VOCABULARY[word.replace("G", "\u0120")] for word in CAPTIONS[caption]), 2]
    assert MODEL.encode(caption, max_length=99) == (expected, False)
    assert MODEL.encode(caption, max_length=2) == (expected[:2], len(expected) > 2)


needs_package = pytest.mark.skipif(not dalle_mini_originals.AVAILABLE, reason=dalle_mini_originals.REASON)
LETTERS = st.one_of(
    st.sampled_from("cathefdr1 0A  _GT"),
    st.characters(),
    st.sampled_from("\u00e4\u00df\u0130\U0001f431\U0001f469\u200d\u2764\ufe0f1\u20e3\U0001f3fd"),
)


@needs_package
@settings(max_examples=1000, deadline=None, database=None)
@given(caption=st.lists(LETTERS, max_size=40).map("".join))
def test_ids_are_those_of_the_original(caption):
    if caption.strip():
        original = dalle_mini_originals.modules()[1].TextTokenizer(VOCABULARY, MERGES)
        assert encode(caption) == original.tokenize(caption)


@needs_package
@pytest.mark.parametrize("caption", CAPTIONS)
def test_hard_captions_of_the_original(caption):
    original = dalle_mini_originals.modules()[1].TextTokenizer(VOCABULARY, MERGES)
    assert encode(caption) == original.tokenize(caption)


def test_blanks_have_no_ids_and_unknown_letters_are_named():
    assert MODEL.encode(" \n ", max_length=9) == ([], False)
    assert MODEL.unknown_letters("a K\u00e4tzchen\t") == "\u00e4\t" and MODEL.unknown_letters("A cat! \U0001f431") == ""
    assert encode_captions(MODEL, ["a caf\u00e9"], 9) == [encode("a caf\u00e9")]
    with pytest.raises(DataError, match="\u732b"):
        encode_captions(MODEL, ["\u732b"], 9)
    with pytest.raises(ValueError, match=r"0\.5"):
        MODEL.encode("a", max_length=9, dropout=0.5, seed=1)


def test_decoding():
    assert MODEL.decode(encode("The  CATS 100")) == "the cats 100"
    assert MODEL.decode([0, VOCABULARY["\u0120a"], 3, 1, 2, 149]) == "a \u2047"


def test_a_workdir_keeps_it(tmp_path):
    MODEL.save(tmp_path / "text")
    assert MODEL.file_name in text_models.FILE_NAMES
    for again in (text_models.load(tmp_path / "text"), pickle.loads(pickle.dumps(MODEL))):
        assert isinstance(again, DalleMiniText) and again.vocab_size == 150
        assert again.encode("a CAT \U0001f431", max_length=9) == MODEL.encode("a CAT \U0001f431", max_length=9)
    again.save(tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "text").read_bytes()


def test_published_files(tmp_path):
    dalle_mini_originals.write_vocabulary(tmp_path)
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    model = DalleMiniText.of_files(vocab, merges)
    assert model.vocab_size == len(VOCABULARY) and model.encode("the cats", max_length=9) == MODEL.encode(
        "the cats", max_length=9
    )
    with pytest.raises(DataError, match=r"merges\.txt"):
        DalleMiniText.of_files(merges, merges)
    with pytest.raises(DataError, match="#version"):
        DalleMiniText.of_files(vocab, vocab)
    merges.write_bytes(b"#version\n\xff\xff")
    with pytest.raises(DataError, match="UTF-8"):
        DalleMiniText.of_files(vocab, merges)
    with pytest.raises(DataError, match="nothing"):
        DalleMiniText.of_files(tmp_path / "nothing", merges)


@pytest.mark.parametrize(
    ("change", "token"),
    [
        ({"vocab": {**VOCABULARY, "a": 150}}, "150"),
        ({"vocab": {**VOCABULARY, "a": -1}}, "-1"),
        ({"vocab": {**VOCABULARY, "a": True}}, "True"),
        ({"vocab": {**VOCABULARY, "a": "7"}}, "'7'"),
        ({"vocab": {name: i for name, i in VOCABULARY.items() if name != "</s>"}}, "</s>"),
        ({"vocab": {**VOCABULARY, "<pad>": 5}}, "<pad>"),
        ({"vocab": []}, "vocab"),
        ({"merges": [["a", "b"]]}, "merge"),
        ({"merges": {}}, "merges"),
        ({"vocab_size": 2**40}, "1099511627776"),
        ({"vocab_size": "150"}, "'150'"),
        ({"vocab_size": None, "merges": None}, "None|list"),
    ],
)
def test_damaged_files(tmp_path, change, token):
    document = {"kind": "dalle-mini", "vocab_size": 150, "vocab": VOCABULARY, "merges": MERGES, **change}
    (tmp_path / "text.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match=rf"text\.json.*({token})"):
        text_models.load(tmp_path / "text.json")


def test_a_file_without_a_part(tmp_path):
    (tmp_path / "text.json").write_text('{"kind": "dalle-mini"}')
    with pytest.raises(DataError, match=r"text\.json.*vocab"):
        text_models.load(tmp_path / "text.json")


@needs_package
def test_the_original_leaves_the_settings_of_torch_alone():
    import torch

    dalle_mini_originals.modules()
    assert torch.is_grad_enabled() and "min_dalle.min_dalle" not in sys.modules
