"""Captions in text files and captions made from names."""

import pytest
from image_folder import captions, fill, left_out, names, opened

from dalle_jax.configuration.options import from_config
from dalle_jax.data.labels import Labels
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.once import opened_once
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, UnreadableExample
from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.token_layout import PaddedIds


def test_text_files_next_to_the_images(tmp_path):
    texts = {"b.txt": "A red thing\n\nSomething red: ü\n", "a/c.txt": b"\xef\xbb\xbfa green thing\r\n"}
    fill(tmp_path, "b.png a/c.jpg", texts)
    source = open_source(DataOptions(source="folder", path=str(tmp_path)), "all")
    assert len(source) == 2
    assert source[0]["name"] == "a/c.jpg" and source[1]["name"] == "b.png"
    assert source[0]["captions"] == ["a green thing"]
    assert source[1]["captions"] == ["A red thing", "Something red: ü"]
    assert source[1]["image"].shape == (2, 2, 3) and source[1]["extra"] == {}
    assert list(source.captions()) == ["a green thing", "A red thing", "Something red: ü"]
    with pytest.raises(IndexError):
        source[2]


@pytest.mark.parametrize("text", ["a.txt", "a.TXT", "A.Txt", "a.jpg.txt", "a.JPG.TXT", "a.caption", "a.jpg.caption"])
def test_names_of_text_files(tmp_path, text):
    source = opened(fill(tmp_path, "a.jpg b.jpg", {text: "a cat", "ab.txt": "no"}))
    assert captions(source) == {"a.jpg": ["a cat"], "b.jpg": []} and source.other_files == {".txt": 1}


def test_each_image_has_the_text_with_its_own_letters(tmp_path):
    fill(tmp_path, "a.png A.png c.png", {"a.txt": "small", "A.txt": "large", "c.caption": "second", "c.txt": "first"})
    source = opened(tmp_path)
    assert captions(source) == {"A.png": ["large"], "a.png": ["small"], "c.png": ["first"]}
    assert source.other_files == {".caption": 1}


def test_line_ends_of_unicode_stay_in_a_caption(tmp_path):
    assert captions(opened(fill(tmp_path, "a.png", {"a.txt": "one\u2028two\r\nthree"}))) == {
        "a.png": ["one\u2028two", "three"]
    }


@pytest.mark.parametrize("text", ["A frog.\nja.utf8=x\n", "\ufeff\n \r\nA frog.\r\nja.utf8=x", "A frog.\rx"])
def test_only_the_first_line(tmp_path, text):
    """As in Tux Paint's stamps, where the further lines are translations."""
    source = opened(fill(tmp_path, "a.png", {"a.txt": text}), caption_lines="first")
    assert source[0]["captions"] == ["A frog."] and list(source.captions()) == ["A frog."]
    assert len(opened(tmp_path)[0]["captions"]) == 2


@pytest.mark.parametrize(
    "name, caption",
    [
        ("big_red-dog_01.png", "big red dog"),
        ("emperor_penguin__02.png", "emperor penguin"),
        ("my.big dog (2).jpg", "my big dog"),
        ("x/photo 1.5.png", "photo"),
        ("x/redCar2.png", "redCar2"),
        ("Кот_猫.png", "Кот 猫"),
        ("0001.png", None),
    ],
)
def test_captions_from_file_names(tmp_path, name, caption):
    fill(tmp_path, "", {name: "", "other.txt": "no", "captions.csv": "no"})
    assert captions(opened(tmp_path, caption_from="file_names")) == {name: [caption] if caption else []}


def test_captions_from_folder_names(tmp_path):
    fill(tmp_path, "a.png golden_retriever/a.png 7/c.png", {"animals/sea birds/b.png": ""})
    assert captions(opened(tmp_path, caption_from="folder_names")) == {
        "7/c.png": ["7"], "a.png": [], "animals/sea birds/b.png": ["sea birds"],
        "golden_retriever/a.png": ["golden retriever"],
    }  # fmt: skip


def test_class_folders_are_labels_under_their_whole_names(tmp_path):
    """Captions from folder names drop numbers, and classes do not: `class_1` and `class_2` are two classes."""
    fill(tmp_path, "train/class_1/a.png train/class_2/b.png train/2024-05/x/d.png val/class_2/c.png val/e.png")
    options = dict(caption_from="folder_names", condition="label")
    found = captions(opened(tmp_path, **options))
    assert found == {
        "train/2024-05/x/d.png": ["2024-05"], "train/class_1/a.png": ["class_1"], "train/class_2/b.png": ["class_2"],
        "val/class_2/c.png": ["class_2"], "val/e.png": [],
    }  # fmt: skip
    labels = Labels.of_captions(opened(tmp_path, "train", **options).captions(), 9)
    assert labels.names == ("2024-05", "class_1", "class_2")
    assert [labels.encode(name, max_length=1)[0] for name in ("class_2", "class_1")] == [[2], [1]]
    with opened_once():  # a tokenizer reads the same folder without labels
        plain, labelled = (
            open_source(DataOptions(source="folder", path=str(tmp_path), **{**options, "condition": condition}), "val")
            for condition in ("text", "label")
        )
        assert (plain[0]["captions"], labelled[0]["captions"]) == (["class"], ["class_2"])


def test_captions_from_paths(tmp_path):
    fill(tmp_path, "a.png 7/c.png", {"animals/sea_birds/sea gull-2.png": ""})
    assert captions(opened(tmp_path, caption_from="paths")) == {
        "7/c.png": ["c"], "a.png": ["a"], "animals/sea_birds/sea gull-2.png": ["animals sea birds gull"],
    }  # fmt: skip


def test_a_split_is_no_caption_from_paths(tmp_path):
    fill(tmp_path, "data/train/cat/a.png data/train/b.png data/val/dog/c.png")
    found = captions(opened(tmp_path, caption_from="paths"))
    assert found == {"data/train/b.png": ["b"], "data/train/cat/a.png": ["cat a"], "data/val/dog/c.png": ["dog c"]}


def test_a_split_is_no_caption(tmp_path):
    fill(tmp_path, "train/cat/a.png train/b.png val/dog/c.png")
    source = opened(tmp_path, caption_from="folder_names")
    assert captions(source) == {"train/b.png": [], "train/cat/a.png": ["cat"], "val/dog/c.png": ["dog"]}


def test_no_caption_at_all_is_an_error_where_captions_are_needed(tmp_path, text_model):
    fill(tmp_path, "a.png b.png c.png", {"d.txt": "no"})
    source = opened(tmp_path)
    assert len(source) == 3 and "caption_from=file_names" in source.captions_missing
    with pytest.raises(DataError, match="caption_from=file_names"):
        source.captions()
    options = DataOptions(source="folder", path=str(tmp_path), image_size=8)
    Pipeline(options, split="all", train=False, batch_size=2)
    with pytest.raises(DataError, match="captions.csv"):
        Pipeline(options, *text_model, split="all", train=False, batch_size=2)
    fill(tmp_path, "", {"c.txt": "a cat"})
    assert opened(tmp_path).captions_missing is None and list(opened(tmp_path).captions()) == ["a cat"]


@pytest.fixture
def text_model():
    model = TextModel.train(["a cat on a mat"], 300)
    return model, PaddedIds(model.vocab_size, 8)


def test_images_without_a_caption_stay(tmp_path):
    """A tokenizer needs no captions. The pipeline counts them when captions are read."""
    source = opened(fill(tmp_path, "a.png b.png", {"a.txt": "a cat"}))
    assert names(source) == ["a.png", "b.png"] and not left_out(source) and not source.other_files
    with pytest.raises(UnreadableExample, match="empty caption"):
        source[1]


def test_an_image_that_is_gone_has_a_reason(tmp_path):
    source = opened(fill(tmp_path, "a.png b.png", {"a.txt": "x", "b.txt": "x"}))
    (tmp_path / "a.png").unlink()
    (tmp_path / "b.txt").unlink()
    for index, reason in enumerate(("missing file", "empty caption")):
        with pytest.raises(UnreadableExample, match=reason):
            source[index]


def test_options_of_folders(tmp_path):
    old = {"source": "folder", "path": "/images", "image_size": 64}  # a configuration from before these options
    assert from_config(DataOptions, old, "data") == DataOptions(**old, caption_lines="all", caption_from="files")
    for bad in ({"caption_lines": "last"}, {"caption_from": "names"}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(bad))}"):
            DataOptions(**old, **bad)
    for useless in ({"caption_lines": "first"}, {"caption_from": "file_names"}):
        with pytest.raises(ConfigError, match=f"data.{next(iter(useless))}"):
            DataOptions(source="shapes_captions", **useless)
