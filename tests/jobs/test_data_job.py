"""The look at a data set: data.json, the contact sheet, the log, and its place before a training."""

import json
import logging

import numpy as np
import PIL.Image
import pytest

from dalle_jax.aot.target import load_target
from dalle_jax.configuration import config_files
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import DataError
from dalle_jax.jobs import data as data_job
from dalle_jax.jobs import train as train_job
from dalle_jax.main import JOBS


def write_images(folder, count, caption="a thing of number {}", size=(9, 9)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        PIL.Image.new("RGB", size, (i, 0, 0)).save(folder / f"{i}.png")
        if caption:
            (folder / f"{i}.txt").write_text(caption.format(i), encoding="utf-8")
    return folder


def config_of(path, **changes):
    config = config_files.load("configs/data.py")
    config.data.path = str(path)
    config.update_from_flattened_dict(changes)
    return config


def sheet_of(workdir):
    with PIL.Image.open(workdir / "samples" / "data.png") as image:
        return np.asarray(image)


@pytest.fixture
def logged(monkeypatch):
    """The lines of the log that the look writes."""
    lines = []

    def log(text, *values):
        if (line := text % values).startswith(("Data: ", "  ")):
            lines.append(line)

    for name in ("info", "warning"):
        monkeypatch.setattr(data_job.logging, name, log)
    return lines


def test_the_job_writes_its_results(tmp_path, logged):
    images = write_images(tmp_path / "images", 30, "a cat\nde.utf8=Eine Katze\nru.utf8=Кошка\n")
    (images / "logo.svg").write_text("<svg/>")
    found = data_job.run(config_of(images), str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "data.json").read_text(encoding="utf-8"))
    splits = written["splits"]
    assert splits["train"]["examples"] + splits["validation"]["examples"] == 30
    assert splits["train"]["captions"] == 3 * splits["train"]["examples"] and splits["train"]["left_out"] == {}
    assert written["other_files"] == {".svg": 1} and written["captions"]["first"][0] == "a cat"
    assert found.source == "folder" and any("caption_lines=first" in line for line in written["advice"])
    assert sheet_of(tmp_path / "out").shape[1] > 900
    text = "\n".join(logged)
    assert "67% of the captions begin with a language code" in text and "1 .svg" in text
    assert 6 <= len(logged) <= 14


def test_captions_in_words(tmp_path, logged):
    """Where each image has one caption, or none has, no number needs to be compared."""
    images = write_images(tmp_path / "images", 40)
    data_job.run(config_of(images), str(tmp_path / "one"))
    assert "  captions: one for each image" in logged
    logged.clear()
    data_job.run(config_of(images, **{"data.caption_from": "folder_names"}), str(tmp_path / "names"))
    assert "  captions: none" in logged  # there are no folders inside
    assert not any("left out" in line for line in logged) and any("caption_from=file_names" in line for line in logged)
    logged.clear()
    write_images(images, 20, "a\nb")
    data_job.run(config_of(images), str(tmp_path / "two"))
    (line,) = (line for line in logged if "  captions:" in line)
    assert "every image has one" in line and "at most 2" in line
    logged.clear()
    for image in images.glob("*.png"):
        image.rename(images / f"red_cat_{image.name}")
    data_job.run(config_of(images, **{"data.caption_from": "file_names"}), str(tmp_path / "names"))
    assert "  captions: one for each image, made from file names" in logged


def test_the_sheet_shows_the_images_that_the_model_sees(tmp_path):
    """Wide images lose their sides, and both splits are shown. The sheet enlarges without smoothing."""
    images = tmp_path / "images"
    for split, color in (("train", (250, 0, 0)), ("validation", (0, 0, 250))):
        write_images(images / split, 3)
        pixels = np.full((16, 48, 3), 9, np.uint8)
        pixels[:, 16:32] = color
        for i in range(3):
            PIL.Image.fromarray(pixels).save(images / split / f"{i}.png")
    data_job.run(config_of(images, **{"data.image_size": 16}), str(tmp_path / "out"))
    sheet = sheet_of(tmp_path / "out")
    for color in ((250, 0, 0), (0, 0, 250)):
        assert (sheet == color).all(-1).sum() == 3 * 128 * 128
    assert not (sheet == 9).all(-1).any()


def test_unreadable_images_do_not_end_the_look(tmp_path):
    images = write_images(tmp_path / "images", 40, caption=None)
    for i in range(0, 40, 2):
        (images / f"{i}.png").write_bytes(b"nothing")
    found = data_job.run(config_of(images), str(tmp_path / "out"))
    assert sum(split.left_out.get("unreadable image", 0) for split in found.splits.values()) == 20
    assert found.captions is None


@pytest.mark.parametrize("variant", ["folder", "shapes", "emoji", "tar_shards", "coco", "cub"])
def test_each_variant_has_the_sections_of_a_look(variant):
    config = config_files.load(f"configs/data.py:{variant}")
    assert config.job in JOBS and config.text.length is None and "path" in config.data


def test_drawn_shapes(tmp_path, logged):
    config = config_files.load("configs/data.py:shapes")
    config.data.builder_kwargs.num_train = 40
    config.data.data_dir = str(tmp_path / "data")
    found = data_job.run(config, str(tmp_path / "out"))
    assert found.splits["train"].examples == 40 and found.path is None
    assert not any("Delete" in line for line in logged)


def examples(workdir):
    written = json.loads((workdir / "data.json").read_text(encoding="utf-8"))
    return sum(split["examples"] for split in written["splits"].values())


def training(path):
    config = load_target("configs/dvae.py:small")
    config.data.path = str(path)
    return config


def test_a_training_begins_with_the_look(tmp_path, monkeypatch, logged):
    trained = []
    monkeypatch.setattr(train_job, "train", lambda config, workdir, **_: trained.append(examples(tmp_path / "out")))
    train_job.run(training(write_images(tmp_path / "images", 30)), str(tmp_path / "out"))
    assert trained == [30] and logged[0].startswith("Data: ")


@pytest.mark.parametrize("path, records", [("images", 2000), ("gs://bucket/images", 200)])
def test_a_training_reads_little(path, records):
    options = DataOptions(source="folder", path=path)
    quick, thorough = data_job._effort(options, True), data_job._effort(options, False)
    assert quick.records == records and thorough.records == 2000
    assert min(quick.pixels / quick.records, thorough.pixels / thorough.records) >= 15_000


def test_a_training_looks_once(tmp_path, logged):
    config, out = training(write_images(tmp_path / "images", 30)), tmp_path / "out"
    assert data_job.look_at(config, str(out)) is not None and logged
    logged.clear()
    written = (out / "data.json").stat().st_mtime_ns
    assert data_job.look_at(config, str(out)) is None
    assert not logged and (out / "data.json").stat().st_mtime_ns == written
    for damage in ("{", "[]", "{}"):
        (out / "data.json").write_text(damage)
        assert data_job.look_at(config, str(out)) is not None and examples(out) == 30


@pytest.mark.parametrize("changed", ["more images", "another caption", "another size"])
def test_a_training_looks_again_at_changed_data(tmp_path, changed):
    config, out = training(write_images(tmp_path / "images", 30)), tmp_path / "out"
    data_job.look_at(config, str(out))
    if changed == "more images":
        write_images(tmp_path / "images", 33)
    elif changed == "another caption":
        (tmp_path / "images" / "7.txt").write_text("longer than before")
    else:
        config.data.image_size = 64
    assert data_job.look_at(config, str(out)) is not None
    assert examples(out) == (33 if changed == "more images" else 30)


def test_drawn_data_take_one_line_in_a_training(tmp_path, logged):
    config = load_target("configs/dvae.py:shapes")
    config.data.builder_kwargs.num_train = 40
    config.data.data_dir = str(tmp_path / "data")
    data_job.look_at(config, str(tmp_path / "out"))
    (line,) = logged
    assert "shapes_captions" in line and "40" in line and (tmp_path / "out" / "samples" / "data.png").exists()


def test_a_prior_needs_captions_and_a_tokenizer_does_not(tmp_path, logged):
    images = write_images(tmp_path / "images", 30, caption=None)
    config = load_target("configs/prior.py:small")
    config.data.path = config.tokenizer.data.path = str(images)
    with pytest.raises(DataError, match="caption"):
        data_job.look_at(config, str(tmp_path / "prior"))
    assert not (tmp_path / "prior" / "data.json").exists()
    found = data_job.look_at(config.tokenizer, str(tmp_path / "dvae"))
    assert found.splits["train"].left_out == {}


def test_the_log_has_no_prefix_and_is_short(tmp_path, caplog):
    images = write_images(tmp_path / "images", 30)
    with caplog.at_level(logging.INFO, logger="absl"):
        data_job.run(config_of(images), str(tmp_path / "out"))
    assert max(len(record.getMessage()) for record in caplog.records if "words" not in record.getMessage()) < 300
