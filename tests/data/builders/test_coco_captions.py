"""MS-COCO's captions: TFDS's own data set if it is prepared, else a local copy in the official layout."""

import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tiny_copies
from absl import logging
from etils import epath

from dalle_jax.data.builders.coco_captions_local import Builder
from dalle_jax.data.builders.made_from import fingerprint
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.token_layout import PaddedIds


def options(tmp_path, path="copy", **others):
    settings = {"source": "coco_captions", "caption_key": "captions/text", "data_dir": str(tmp_path / "data")}
    return DataOptions(**{**settings, "path": path and str(tmp_path / path), "image_size": 16, **others})


@pytest.fixture
def copy(tmp_path):
    return tiny_copies.coco(tmp_path / "copy")


# -- from a local copy ----------------------------------------------------------------------------------------------


def test_local_copy(tmp_path, copy):
    train, validation = (open_source(options(tmp_path), split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (8, 4)
    assert "tensorflow" not in sys.modules
    example = train[0]
    assert example["extra"]["image/id"] == 9 and example["extra"]["image/filename"] == "COCO_train2014_000000000009.jpg"
    assert "COCO_train2014_000000000009.jpg" in example["name"]
    assert example["captions"] == [tiny_copies.caption(0, version) for version in range(5)]
    assert example["image"].shape == (60, 72, 3)
    assert [train[i]["extra"]["image/id"] for i in range(8)] == [9 + 16 * i for i in range(8)], (
        "in the order of the ids"
    )
    assert validation[0]["captions"][0] == tiny_copies.caption(8, 0)
    assert train.left_out == validation.left_out == ()


def test_images_are_stored_unchanged(tmp_path, copy):
    source = open_source(options(tmp_path), "train")
    assert source.record(2).image == (copy / "train2014" / "COCO_train2014_000000000041.jpg").read_bytes()


def test_a_prepared_data_set_does_not_need_the_copy(tmp_path, copy):
    prepared = open_source(options(tmp_path), "train")[3]
    shutil.rmtree(copy)
    np.testing.assert_array_equal(open_source(options(tmp_path, path=None), "train")[3]["image"], prepared["image"])


def test_many_shards_keep_the_order(tmp_path, copy, monkeypatch):
    monkeypatch.setattr(
        "dalle_jax.data.builders.coco_captions_local.coco_captions_local_dataset_builder._IMAGES_PER_SHARD", 3
    )
    source = open_source(options(tmp_path), "train")
    assert [source[i]["extra"]["image/id"] for i in range(8)] == [9 + 16 * i for i in range(8)]
    assert len(list((tmp_path / "data").glob("coco_captions_local/2014_*/1.0.0/*train.array_record*"))) == 3


def test_2017(tmp_path):
    tiny_copies.coco(tmp_path / "copy", year=2017)
    source = open_source(options(tmp_path, builder_kwargs={"year": 2017}), "validation")
    assert source[0]["extra"]["image/filename"] == "000000000137.jpg"
    with pytest.raises(DataError, match="data.builder_kwargs.year=2017"):
        open_source(options(tmp_path), "train")
    with pytest.raises(ConfigError, match="2015"):
        Builder(data_dir=tmp_path, year=2015)


@pytest.mark.parametrize("name", ["annotations/captions_val2014.json", "train2014"])
def test_missing_files_are_named(tmp_path, copy, name):
    found = copy / name
    found.rename(copy / "elsewhere")
    with pytest.raises(DataError, match=name):
        open_source(options(tmp_path), "train")


def test_without_a_copy_the_error_names_the_downloads(tmp_path):
    with pytest.raises(DataError, match="data.path"):
        open_source(options(tmp_path, path=None), "train")


@pytest.mark.parametrize("content", ["nonsense", "[]", '{"images": [{"id": 1}], "annotations": []}'])
def test_a_damaged_table_is_an_error(tmp_path, copy, content):
    (copy / "annotations" / "captions_val2014.json").write_text(content)
    with pytest.raises(DataError, match="captions_val2014.json"):
        open_source(options(tmp_path), "train")


def test_damaged_examples_are_skipped_counted_and_named(tmp_path, copy, monkeypatch):
    """A missing file is found when the data set is prepared; a damaged image and missing captions in each run."""
    images = copy / "train2014"
    (images / "COCO_train2014_000000000009.jpg").unlink()
    damaged = images / "COCO_train2014_000000000025.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    table = copy / "annotations" / "captions_train2014.json"
    content = json.loads(table.read_text())
    content["annotations"] = [each for each in content["annotations"] if each["image_id"] != 41]
    for each in content["annotations"]:
        if each["image_id"] == 57:
            each["caption"] = "  "
    table.write_text(json.dumps(content))

    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    source = open_source(options(tmp_path), "train")
    assert len(source) == 7
    assert [(found.reason, found.count) for found in source.left_out] == [("missing file", 1)]
    model = TextModel.train(source.captions(), 100)
    captions = PaddedIds(model.vocab_size, 24)
    pipeline = Pipeline(options(tmp_path), model, captions, split="train", train=True, batch_size=7, source=source)
    with iter(pipeline) as batches:
        for _ in range(2):
            next(batches)
    assert pipeline.skipped() == {"empty caption": 2, "missing file": 1, "unreadable image": 1}
    assert pipeline.counts()["left_out/missing file"] == 1
    for key in ("0009", "0025", "0041", "0057"):
        assert any(f"{key}.jpg" in line for line in lines), key


# -- the prepared copy ----------------------------------------------------------------------------------------------


def test_another_local_copy_is_prepared_too(tmp_path, copy):
    assert len(open_source(options(tmp_path), "train")) == 8
    tiny_copies.coco(tmp_path / "larger", train=9)
    assert len(open_source(options(tmp_path, path="larger"), "train")) == 9
    assert len(open_source(options(tmp_path), "train")) == 8


def test_the_path_is_part_of_the_fingerprint(tmp_path):
    """Two copies with equal files of equal times are kept apart, because the images in them may differ."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "table").write_text("same")
        os.utime(tmp_path / name / "table", (1, 1))
    one, two = (
        fingerprint(epath.Path(tmp_path / name), [epath.Path(tmp_path / name / "table")]) for name in ("one", "two")
    )
    assert one != two


def test_a_copy_that_was_incomplete_is_prepared_again(tmp_path, copy):
    images = copy / "train2014"
    (images / "COCO_train2014_000000000009.jpg").rename(tmp_path / "later.jpg")
    assert len(open_source(options(tmp_path), "train")) == 7
    (tmp_path / "later.jpg").rename(images / "COCO_train2014_000000000009.jpg")
    source = open_source(options(tmp_path), "train")
    assert len(source) == 8 and source.left_out == ()


def test_corrected_captions_are_prepared_again(tmp_path, copy):
    open_source(options(tmp_path), "train")
    table = copy / "annotations" / "captions_train2014.json"
    table.write_text(table.read_text().replace("A red", "A RED"))
    assert "A RED" in open_source(options(tmp_path), "train")[0]["captions"][0]


def test_the_newest_copy_is_used_when_the_local_one_is_gone(tmp_path, copy, monkeypatch):
    open_source(options(tmp_path), "train")
    shutil.rmtree(copy)
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    assert len(open_source(options(tmp_path), "train")) == 8
    assert any("delete" in line and str(copy) in line for line in lines)


# -- TFDS's own -----------------------------------------------------------------------------------------------------


OFFICIAL = {  # the features of TFDS's coco_captions/2014:1.1.0
    "image": tfds.features.Image(encoding_format="jpeg"),
    "image/filename": tfds.features.Text(),
    "image/id": np.int64,
    "objects": tfds.features.Sequence(
        {
            "id": np.int64,
            "area": np.int64,
            "bbox": tfds.features.BBoxFeature(),
            "label": tfds.features.ClassLabel(num_classes=80),
            "is_crowd": np.bool_,
        }
    ),
    "captions": tfds.features.Sequence({"text": np.str_, "id": np.int64}),
}
SPLITS = {"train": 3, "val": 1, "test": 2, "restval": 4}


class Official(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes the same files as TFDS's own builder, without its archives of 40 GB and without TensorFlow."""

    name = "coco_captions"
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="2014", version=tfds.core.Version("1.1.0"))]

    def _info(self):
        features = tfds.features.FeaturesDict(OFFICIAL)
        return tfds.core.DatasetInfo(builder=self, features=features, description="as TFDS writes it")

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, count) for split, count in SPLITS.items()}

    def _generate_examples(self, split, count):
        for i in range(count):
            number = 100 * list(SPLITS).index(split) + i
            box = tfds.features.BBox(ymin=0.1, xmin=0.2, ymax=0.3, xmax=0.4)
            yield (
                f"COCO_{number}.jpg",
                {
                    "image": io.BytesIO(tiny_copies.image(number)),
                    "image/filename": f"COCO_{number}.jpg",
                    "image/id": number,
                    "objects": [{"id": 7, "area": 12, "bbox": box, "label": 3, "is_crowd": False}] * (i % 3),
                    "captions": [{"text": tiny_copies.caption(number, v), "id": v} for v in range(5)],
                },
            )


@pytest.fixture
def official(tmp_path):
    builder = Official(data_dir=tmp_path / "data", file_format="array_record")
    builder.download_and_prepare()
    assert str(builder.data_path).endswith("coco_captions/2014/1.1.0")
    return builder


def test_these_are_the_official_features(tmp_path, monkeypatch):
    from tensorflow_datasets.object_detection import coco, coco_captions

    if "tensorflow" not in sys.modules:  # its builder gets the name of a dtype from TensorFlow
        monkeypatch.setattr(coco, "tf", type("types", (), {"int64": np.int64}))
    features = coco_captions.CocoCaptions(data_dir=tmp_path).info.features
    assert repr(features) == repr(tfds.features.FeaturesDict(OFFICIAL))


def test_official(tmp_path, official):
    sources = {split: open_source(options(tmp_path, path=None), split) for split in (*SPLITS, "validation")}
    assert {split: len(source) for split, source in sources.items()} == {**SPLITS, "validation": 7}
    assert "tensorflow" not in sys.modules
    for source in sources.values():
        for example in (source[i] for i in range(len(source))):
            number = int(example["extra"]["image/id"])
            assert example["captions"] == [tiny_copies.caption(number, version) for version in range(5)]
            assert example["image"].shape == (60, 72, 3) and f"COCO_{number}.jpg" in example["name"]
    whole, parts = sources["validation"], [sources[split] for split in ("val", "test", "restval")]
    ids = [part[i]["extra"]["image/id"] for part in parts for i in range(len(part))]
    assert [whole[i]["extra"]["image/id"] for i in range(7)] == ids
    assert len(open_source(options(tmp_path, path=None), "val+restval[:50%]")) == 3
    with pytest.raises(DataError, match="heldout"):
        open_source(options(tmp_path, path=None), "val+heldout")


def test_official_is_preferred_to_the_local_copy(tmp_path, official, copy):
    assert len(open_source(options(tmp_path), "train")) == SPLITS["train"]


def test_a_format_without_random_access_is_ignored(tmp_path, official, copy, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    facts = official.data_path / "dataset_info.json"
    facts.write_text(facts.read_text().replace("array_record", "tfrecord"))
    assert len(open_source(options(tmp_path), "train")) == 8
    assert any("tfrecord" in line and "array_record" in line for line in lines)


def test_wrong_keys_are_named(tmp_path, official):
    with pytest.raises(DataError, match="captions/words"):
        open_source(options(tmp_path, path=None, caption_key="captions/words"), "train")


def test_worker_processes_can_read_it(tmp_path, copy):
    pipeline = Pipeline(options(tmp_path, workers=1), split="train", train=True, batch_size=4)
    with iter(pipeline) as batches:
        assert next(batches)["image"].shape == (4, 16, 16, 3)
