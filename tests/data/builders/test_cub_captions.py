"""CUB-200-2011 with its ten captions, from copies in the official layout."""

import sys

import numpy as np
import pytest
import tiny_copies
from absl import logging

from dalle_jax.data.builders.cub_captions import Builder
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.token_layout import PaddedIds


def options(tmp_path, **others):
    settings = {"source": "cub_captions", "path": str(tmp_path / "copy"), "data_dir": str(tmp_path / "data")}
    return DataOptions(**{**settings, "image_size": 16, "eval_split": "test", **others})


@pytest.fixture
def copy(tmp_path):
    return tiny_copies.cub(tmp_path / "copy")


def numbers(source):
    """Returns the places in images.txt, counted from 0, which the first captions contain."""
    return [int(source[i]["captions"][0].split("number ")[1].split(",")[0]) for i in range(len(source))]


def test_official_division(tmp_path, copy):
    train, test = (open_source(options(tmp_path), split) for split in ("train", "test"))
    assert numbers(train) == list(range(0, 16, 2)) and numbers(test) == list(range(1, 16, 2))
    assert "tensorflow" not in sys.modules
    example = test[2]  # the sixth row
    assert example["captions"] == [tiny_copies.caption(5, version) for version in range(10)]
    assert example["extra"]["file"] == "002.Laysan_Albatross/Laysan_Albatross_0002_796001.jpg" in example["name"]
    assert example["extra"]["species"] == "002.Laysan_Albatross"
    np.testing.assert_array_equal(example["extra"]["bounding_box"], [6.0, 2.0, 40.0, 30.0])
    assert test.record(2).image == tiny_copies.image(5)
    assert train.left_out == ()


def test_division_by_class(tmp_path, copy):
    settings = options(tmp_path, builder_kwargs={"division": "classes"})
    train, test = (open_source(settings, split) for split in ("train", "test"))
    assert numbers(train) == list(range(12)) and numbers(test) == list(range(12, 16))
    assert {test[i]["extra"]["species"] for i in range(len(test))} == {"004.Groove_billed_Ani"}
    assert len(open_source(options(tmp_path), "train")) == 8, "both are on disk"
    with pytest.raises(ConfigError, match="mine"):
        Builder(data_dir=tmp_path, division="mine")


def test_lists_of_classes_must_name_all(tmp_path, copy):
    (copy / "cvpr2016_cub" / "testclasses.txt").write_text("")
    with pytest.raises(DataError, match="004.Groove_billed_Ani"):
        open_source(options(tmp_path, builder_kwargs={"division": "classes"}), "train")


@pytest.mark.parametrize("place", ["text_c10", "CUB_200_2011/text_c10"])
def test_captions_may_be_in_other_folders(tmp_path, copy, place):
    (copy / "cvpr2016_cub" / "text_c10").rename(copy / place)
    assert len(open_source(options(tmp_path), "train")[0]["captions"]) == 10


def test_missing_files_are_named(tmp_path, copy):
    (copy / "cvpr2016_cub" / "text_c10").rename(copy / "elsewhere")
    with pytest.raises(DataError, match="copy/cvpr2016_cub/text_c10"):
        open_source(options(tmp_path), "train")
    (copy / "elsewhere").rename(copy / "text_c10")
    (copy / "CUB_200_2011" / "images.txt").rename(copy / "elsewhere.txt")
    with pytest.raises(DataError, match="images.txt"):
        open_source(options(tmp_path), "train")
    (copy / "CUB_200_2011").rename(copy / "birds")
    with pytest.raises(DataError, match="CUB_200_2011.tgz"):
        open_source(options(tmp_path), "train")
    with pytest.raises(DataError, match="data.path"):
        open_source(options(tmp_path, path=None), "train")


@pytest.mark.parametrize(
    "table, content, token",
    [
        ("image_class_labels.txt", "1 1\n", "KeyError"),
        ("bounding_boxes.txt", "1 a b c d\n", "ValueError"),
        ("classes.txt", "1\n", "classes.txt"),
    ],
)
def test_damaged_tables_are_errors(tmp_path, copy, table, content, token):
    (copy / "CUB_200_2011" / table).write_text(content)
    with pytest.raises(DataError, match=token):
        open_source(options(tmp_path), "train")


def test_damaged_examples_are_skipped_counted_and_named(tmp_path, copy, monkeypatch):
    images, texts = copy / "CUB_200_2011" / "images", copy / "cvpr2016_cub" / "text_c10"
    one, two, three, four = (f"{name}" for name in (copy / "CUB_200_2011" / "images.txt").read_text().split()[1::4][:4])
    (images / one).unlink()
    (images / two).write_bytes(b"\xff\xd8 not an image")
    (texts / three).with_suffix(".txt").unlink()
    (texts / four).with_suffix(".txt").write_text("\n \n")
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    source = open_source(options(tmp_path), "train")
    model = TextModel.train(source.captions(), 100)
    captions = PaddedIds(model.vocab_size, 24)
    pipeline = Pipeline(options(tmp_path), model, captions, split="train", train=False, batch_size=7, source=source)
    with iter(pipeline) as batches:
        assert next(batches)["valid"].tolist() == [False, False, False, True, True, True, True]
    assert pipeline.skipped() == {"empty caption": 2, "missing file": 1, "unreadable image": 1}
    for name in (one, two, three, four):
        assert any(name in line for line in lines), name
    assert Pipeline(options(tmp_path), split="train", train=True, batch_size=2).skipped()["missing file"] == 1


def test_a_copy_is_prepared_again_when_files_were_added(tmp_path, copy):
    image = next((copy / "CUB_200_2011" / "images").rglob("*.jpg"))
    content = image.read_bytes()
    image.unlink()
    before = sum(len(open_source(options(tmp_path), split)) for split in ("train", "test"))
    image.write_bytes(content)
    assert sum(len(open_source(options(tmp_path), split)) for split in ("train", "test")) == before + 1
    texts = copy / "cvpr2016_cub" / "text_c10"
    place = texts / (copy / "CUB_200_2011" / "images.txt").read_text().split()[1]
    place.with_suffix(".txt").unlink()
    assert open_source(options(tmp_path), "train").record(0).captions == ()
