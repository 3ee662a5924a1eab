import csv
import json
import pickle

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from dalle_jax.configuration.options import from_config
from dalle_jax.data.sources import tfds
from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, LeftOut, UnreadableExample
from dalle_jax.errors import ConfigError, DataError


def save(path, color=(255, 0, 0), size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode, size, color).save(path)


def reason(source, index):
    with pytest.raises(UnreadableExample) as caught:
        source[index]
    return caught.value.reason


def test_text_files_next_to_the_images(tmp_path):
    save(tmp_path / "b.png")
    save(tmp_path / "a" / "c.jpg", (0, 255, 0))
    (tmp_path / "b.txt").write_text("A red thing\n\nSomething red: ü\n", encoding="utf-8")
    (tmp_path / "a" / "c.txt").write_bytes(b"\xef\xbb\xbfa green thing\r\n")
    source = open_source(DataOptions(source="folder", path=str(tmp_path)), "all")
    assert len(source) == 2
    assert source[0]["name"] == "a/c.jpg" and source[1]["name"] == "b.png"
    assert source[0]["captions"] == ["a green thing"]
    assert source[1]["captions"] == ["A red thing", "Something red: ü"]
    assert source[1]["image"].shape == (4, 6, 3) and source[1]["image"].dtype == np.uint8
    np.testing.assert_array_equal(source[1]["image"][0, 0], [255, 0, 0])
    assert source[1]["extra"] == {}
    assert list(source.captions()) == ["a green thing", "A red thing", "Something red: ü"]
    with pytest.raises(IndexError):
        source[2]


@pytest.mark.parametrize("file_key", ["file", "file_name", "image"])
def test_jsonl(tmp_path, file_key):
    for name in ("x.png", "y.png"):
        save(tmp_path / name)
    rows = [{file_key: "y.png", "caption": "why"}, {file_key: "x.png", "captions": ["ex", "cross"]}]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    source = FolderSource(tmp_path)
    assert [source[i]["name"] for i in range(2)] == ["y.png", "x.png"]  # the order of the rows
    assert [source[i]["captions"] for i in range(2)] == [["why"], ["ex", "cross"]]


def test_csv(tmp_path):
    save(tmp_path / "x.png")
    with open(tmp_path / "captions.csv", "w", newline="") as file:
        rows = [["file", "captions"], ["x.png", "one, a comma|two"], ["gone.png", "three"]]
        csv.writer(file).writerows(rows)
    source = FolderSource(tmp_path)
    assert source[0]["captions"] == ["one, a comma", "two"]
    assert reason(source, 1) == "missing file"


def test_each_fault_of_an_example_has_a_reason(tmp_path):
    for name in ("1", "2", "3", "4", "5"):
        save(tmp_path / f"{name}.png", size=(64, 64))
        (tmp_path / f"{name}.txt").write_text("fine")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.txt").write_bytes(b"caf\xe9")
    (tmp_path / "3.txt").write_text(" \n ")
    (tmp_path / "4.txt").unlink()
    source = FolderSource(tmp_path)
    assert [reason(source, i) for i in range(4)] == [
        "unreadable image",
        "undecodable text",
        "empty caption",
        "empty caption",
    ]
    assert source[4]["captions"] == ["fine"]
    assert list(source.captions()) == ["fine", "fine"]  # of 1 and 5: the caption of a damaged image is still read


def test_one_undecodable_row_costs_one_example(tmp_path):
    save(tmp_path / "x.png")
    (tmp_path / "captions.jsonl").write_bytes(
        b'{"file": "x.png", "caption": "caf\xe9"}\n{"file": "x.png", "caption": "tea"}\n'
    )
    source = FolderSource(tmp_path)
    assert reason(source, 0) == "undecodable text"
    assert source[1]["captions"] == ["tea"]


def test_transparency_becomes_white_and_grey_becomes_rgb(tmp_path):
    save(tmp_path / "a.png", (255, 0, 0, 0), mode="RGBA")
    save(tmp_path / "b.png", 7, mode="L")
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("x")
    source = FolderSource(tmp_path)
    np.testing.assert_array_equal(source[0]["image"], 255)
    np.testing.assert_array_equal(source[1]["image"], 7)


def test_splits_of_a_folder(tmp_path):
    rows = [{"file": f"{i}.png", "caption": "x"} for i in range(60)]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    splits = ("train", "validation", "all")
    names = {split: [e[0] for e in FolderSource(tmp_path, split)._entries] for split in splits}
    assert len(names["validation"]) == 3 and len(names["train"]) == 57
    assert sorted(names["train"] + names["validation"]) == sorted(names["all"])
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps(row) for row in rows[::-1]))
    assert sorted(e[0] for e in FolderSource(tmp_path, "validation")._entries) == sorted(names["validation"])
    with pytest.raises(DataError, match="test"):
        FolderSource(tmp_path, "test")
    save(tmp_path / "test" / "only.png")
    assert [e[0] for e in FolderSource(tmp_path, "test")._entries] == ["only.png"]


def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match="data.path"):
        FolderSource(tmp_path / "absent")
    with pytest.raises(DataError, match="captions.jsonl"):
        FolderSource(tmp_path)
    (tmp_path / "captions.jsonl").write_text('{"file": "x.png", "caption": "a"}\nnonsense\n')
    with pytest.raises(DataError, match="line 2"):
        FolderSource(tmp_path)
    for row in ('{"caption": "a"}', '["x.png"]', '{"file": "x.png", "caption": 3}'):
        (tmp_path / "captions.jsonl").write_text(row)
        with pytest.raises(DataError, match="row 1"):
            FolderSource(tmp_path)


def test_options_from_config():
    config = ConfigDict({"source": "folder", "path": "/images", "image_size": 64, "builder_kwargs": {}})
    assert from_config(DataOptions, config, "data") == DataOptions(source="folder", path="/images", image_size=64)
    with pytest.raises(ConfigError, match="imagesize"):
        from_config(DataOptions, {"imagesize": 64}, "data")
    bad_values = {"augment": "flip", "image_size": 0, "workers": -1, "bpe_dropout": 1.0, "source": "folder"}
    for bad in ({key: value} for key, value in bad_values.items()):
        with pytest.raises(ConfigError, match="data."):
            from_config(DataOptions, bad, "data")


def test_unknown_tfds_name(tmp_path):
    with pytest.raises(DataError, match="no_such_set"):
        open_source(DataOptions(source="no_such_set", data_dir=str(tmp_path)), "train")


def test_examples_left_out_by_an_earlier_version_are_counted():
    """These keys are stored with every prepared data set."""
    stored = {"left_out": {"train": {"missing picture": {"count": 7, "names": ["a", "b"]}}, "test": {}}}
    assert tfds._left_out(stored, ["train", "test"]) == (LeftOut("missing picture", 7, ("a", "b")),)
    assert tfds._left_out(stored, ["test"]) == tfds._left_out(None, ["train"]) == ()


def test_unreadable_example_travels_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableExample("empty caption", "a.png", "x")))
    assert (error.reason, error.name, str(error)) == ("empty caption", "a.png", "a.png: empty caption (x)")
