import pickle

import numpy as np
import PIL.Image
import pytest
from ml_collections import ConfigDict

from dalle_jax.configuration.options import from_config
from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, LeftOut, UnreadableExample, sum_left_out
from dalle_jax.errors import ConfigError, DataError


def save(path, color=(255, 0, 0), size=(6, 4), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new(mode, size, color).save(path)


def reason(source, index):
    with pytest.raises(UnreadableExample) as caught:
        source[index]
    return caught.value.reason


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
    assert sum_left_out(stored["left_out"], ["train", "test"]) == (LeftOut("missing picture", 7, ("a", "b")),)
    assert sum_left_out(stored["left_out"], ["test"]) == sum_left_out({}, ["train"]) == ()


def test_unreadable_example_travels_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableExample("empty caption", "a.png", "x")))
    assert (error.reason, error.name, str(error)) == ("empty caption", "a.png", "a.png: empty caption (x)")
