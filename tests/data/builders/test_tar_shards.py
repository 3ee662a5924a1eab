"""Image–caption tar shards, as img2dataset and WebDataset write them. Damage is counted and named."""

import gzip
import io
import json
import sys
import tarfile
import tracemalloc

import pytest
import tiny_copies
from absl import logging

from dalle_jax.data.builders.local_copy import ReadOnce
from dalle_jax.data.builders.tar_shards import Builder
from dalle_jax.data.builders.tar_shards.reading import DamagedShard, read_samples
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.token_layout import TokenLayout


def options(tmp_path, path="shards", **others):
    settings = {"source": "tar_shards", "path": str(tmp_path / path), "data_dir": str(tmp_path / "data")}
    return DataOptions(**{**settings, "image_size": 16, **others})


def files(source):
    return [source.record(i).extra["file"] for i in range(len(source))]


def members(count, ending="jpg"):
    pairs = [(number, tiny_copies.sample(number, ending)) for number in range(count)]
    return [(f"{number:09}.{end}", content) for number, sample in pairs for end, content in sample.items()]


def read(content, **arguments):
    """Returns the samples of a shard, and the message of its damage or None."""
    found = []
    try:
        for sample in read_samples(io.BytesIO(content), **arguments):
            found.append(sample)
    except DamagedShard as error:
        return found, str(error)
    return found, None


def tar(tmp_path, entries, mode="w"):
    return tiny_copies.write_tar(tmp_path / "shard.tar", entries, mode).read_bytes()


# -- one shard ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_complete_shard(tmp_path, ending, mode):
    found, damage = read(tar(tmp_path, members(5, ending), mode))
    assert damage is None and [sample.key for sample in found] == [f"{number:09}" for number in range(5)]
    for number, sample in enumerate(found):
        assert sample.image == tiny_copies.sample(number, ending)[ending]
        assert sample.captions == (tiny_copies.caption(number, 0).encode(),)


def test_names(tmp_path):
    """Keys end at the first dot of the last part. Other endings are ignored; folders and capitals are accepted."""
    entries = [
        ("a.b/x.y.jpg", b"no"),
        ("a.b/x.JPG", b"1"),
        ("a.b/x.cls", b"7"),
        ("a.b/x.txt", b"one"),
        ("LICENSE", b""),
    ]
    entries += [("c/x.png", b"2"), ("c/x.json", b'{"caption": "two"}'), ("c/" + "y" * 200 + "ü.webp", b"3")]
    found, damage = read(tar(tmp_path, entries))
    assert damage is None
    assert [(sample.key, sample.image) for sample in found] == [
        ("a.b/x", b"1"),
        ("c/x", b"2"),
        ("c/" + "y" * 200 + "ü", b"3"),
    ]


@pytest.mark.parametrize(
    "parts, captions",
    [
        ({"txt": b"text", "json": b'{"caption": "facts"}'}, (b"text",)),
        ({"txt": b" \n", "json": b'{"caption": "facts"}'}, (b"facts",)),
        ({"json": b'{"caption": ["one", "two", 3]}'}, (b"one", b"two")),
        ({"json": b'{"caption": null}'}, ()),
        ({"json": b'["caption"]'}, ()),
        ({"json": b'{"caption": "tru'}, ()),
        ({"json": json.dumps({"caption": "\ud83d"}).encode()}, (b"\xed\xa0\xbd",)),
        ({"txt": b"caf\xe9"}, (b"caf\xe9",)),
        ({}, ()),
    ],
)
def test_captions(tmp_path, parts, captions):
    found, _ = read(tar(tmp_path, [("x.jpg", b"image"), *((f"x.{end}", part) for end, part in parts.items())]))
    assert [sample.captions for sample in found] == [captions]


def test_only_selected_samples_are_read(tmp_path):
    found, _ = read(tar(tmp_path, members(9)), wanted=lambda number: number % 4 == 1)
    assert [int(sample.key) for sample in found] == [1, 5]


def offsets(content):
    """Returns the offset and the size of each member's data."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        return {member.name: (member.offset_data, member.size) for member in archive}


@pytest.mark.parametrize("within", ["image", "text", "header", "end mark"])
def test_a_truncated_shard_gives_the_samples_before(tmp_path, within):
    whole = tar(tmp_path, members(5))
    places = offsets(whole)
    at, count = {
        "image": (places["000000003.jpg"][0] + 700, 3),
        "text": (places["000000003.txt"][0] + 5, 3),
        "header": (places["000000003.jpg"][0] - 100, 3),
        "end mark": (places["000000004.json"][0] + 512, 5),
    }[within]
    found, damage = read(whole[:at])
    assert [int(sample.key) for sample in found] == list(range(count))
    assert f"{count} samples before that" in damage
    assert found[-1].image == tiny_copies.sample(count - 1)["jpg"]


def test_garbage_in_the_middle_is_not_the_end(tmp_path):
    whole = tar(tmp_path, members(5))
    data = offsets(whole)["000000002.jpg"][0]
    for start in (data - 512, data - 3 * 512):  # the header; the extended header before it
        for filling in (b"\xa5", b"\0"):
            found, damage = read(whole[:start] + filling * 4096 + whole[start + 4096 :])
            assert [int(sample.key) for sample in found] == [0, 1] and "2 samples before that" in damage


@pytest.mark.parametrize("content", [b"", b"garbage" * 1000, b"\x1f\x8b\x08 no gzip"])
def test_a_file_that_is_no_tar(content):
    found, damage = read(content)
    assert not found and "0 samples" in damage and "\n" not in damage


def test_a_truncated_compressed_shard(tmp_path):
    packed = gzip.compress(tar(tmp_path, members(20)))
    found, damage = read(packed[: len(packed) // 2])
    assert damage and 5 <= len(found) <= 12


def test_memory_holds_one_sample(tmp_path):
    shard = tiny_copies.write_tar(tmp_path / "big.tar", ((f"{i}.jpg", bytes([i]) * 500_000) for i in range(60)))
    tracemalloc.start()
    with shard.open("rb") as file:
        assert sum(len(sample.image) for sample in read_samples(file)) == 30_000_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


# -- the data set ---------------------------------------------------------------------------------------------------


def test_splits_of_a_folder_of_shards(tmp_path):
    tiny_copies.tar_shards(tmp_path / "shards", shards=2, samples=25)
    train, validation = (open_source(options(tmp_path), split) for split in ("train", "validation"))
    assert files(validation) == [f"{s:05}.tar/{10000 * s + i:09}" for s in range(2) for i in (0, 20)]
    assert files(train) == [f"{s:05}.tar/{10000 * s + i:09}" for s in range(2) for i in range(25) if i % 20]
    assert "tensorflow" not in sys.modules
    example = train[0]
    assert example["captions"] == [tiny_copies.caption(1, 0)] and example["image"].shape == (60, 72, 3)
    assert train.record(0).image == tiny_copies.sample(1)["jpg"] and "00000.tar/000000001" in example["name"]


def test_folders_are_splits(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        tiny_copies.tar_shards(tmp_path / "shards" / split, shards=1, samples=count)
    assert [len(open_source(options(tmp_path), split)) for split in ("train", "test")] == [3, 2]
    with pytest.raises(DataError, match="validation"):
        open_source(options(tmp_path), "validation")


def test_globs(tmp_path):
    tiny_copies.tar_shards(tmp_path / "shards", shards=3, samples=2)
    assert len(open_source(options(tmp_path, path="shards/0000[12].tar"), "train")) == 2
    assert len(open_source(options(tmp_path, path="sh*/*.tar"), "train")) == 3


def test_other_shards_are_another_data_set(tmp_path):
    folder = tiny_copies.tar_shards(tmp_path / "shards", shards=1)
    places = {Builder(data_dir=tmp_path, path=str(folder)).data_path}
    tiny_copies.tar_shards(folder, shards=2)
    places.add(Builder(data_dir=tmp_path, path=str(folder)).data_path)
    tiny_copies.tar_shards(folder, shards=2, samples=40)
    places.add(Builder(data_dir=tmp_path, path=str(folder)).data_path)
    assert len(places) == 3
    moved = folder.rename(tmp_path / "moved")
    assert Builder(data_dir=tmp_path, path=str(moved)).data_path in places


def test_errors(tmp_path):
    with pytest.raises(ConfigError, match="data.path"):
        DataOptions(source="tar_shards")
    with pytest.raises(DataError, match="absent"):
        open_source(options(tmp_path, path="absent"), "train")
    (tmp_path / "shards").mkdir()
    with pytest.raises(DataError, match=".tgz"):
        open_source(options(tmp_path), "train")
    (tmp_path / "shards" / "0.tar").write_bytes(b"garbage" * 1000)
    with pytest.raises(DataError, match="0.tar"):
        open_source(options(tmp_path), "train")
    assert not list((tmp_path / "data").glob("tar_shards/*/1.0.0")), "a failed preparation leaves no files"


def test_damage_is_skipped_counted_and_named(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    folder = tiny_copies.tar_shards(tmp_path / "shards", shards=1)
    (folder / "00001.tar").write_bytes(b"garbage" * 1000)
    whole = tiny_copies.write_tar(folder / "00002.tar", members(10)).read_bytes()
    (folder / "00002.tar").write_bytes(whole[: offsets(whole)["000000006.jpg"][0] + 900])
    image = tiny_copies.image(1)
    broken = [("first.jpg", image), ("first.txt", b"fine"), ("cut.jpg", image[:300]), ("cut.txt", b"fine")]
    broken += [("empty.jpg", image), ("empty.txt", b""), ("none.jpg", image), ("alone.txt", b"no image")]
    broken += [("latin.jpg", image), ("latin.txt", b"caf\xe9"), ("nothing.jpg", b""), ("nothing.txt", b"fine")]
    tiny_copies.write_tar(folder / "00003.tar", broken)

    source = open_source(options(tmp_path), "train")
    assert len(source) == 9 + 5 + 5
    assert {found.reason: (found.count, found.names) for found in source.left_out} == {
        "damaged shard": (2, source.left_out[0].names),
        "missing image": (1, ("00003.tar/alone",)),
    }
    assert "00001.tar" in source.left_out[0].names[0] and "6 samples before" in source.left_out[0].names[1]
    model = TextModel.train(source.captions(), 100)
    layout = TokenLayout(model.vocab_size, 16, 24, 2, 2)
    pipeline = Pipeline(options(tmp_path), model, layout, split="train", train=True, batch_size=19, source=source)
    with iter(pipeline) as batches:
        next(batches)
    assert pipeline.skipped() == {
        "damaged shard": 2,
        "empty caption": 2,
        "missing image": 1,
        "undecodable text": 1,
        "unreadable image": 2,
    }
    for name in ("00001.tar (", "00002.tar (", "alone", "empty", "none", "latin", "cut", "nothing"):
        assert any(name in line for line in lines), name
    again = Pipeline(options(tmp_path), split="train", train=True, batch_size=2)
    assert again.skipped()["damaged shard"] == 2, "the prepared data set remembers it"


def test_images_are_released_when_written(tmp_path, monkeypatch):
    """TFDS keeps the examples of a shard until it is written, which must not include the bytes of the images."""
    tiny_copies.write_tar(tmp_path / "shards" / "0.tar", ((f"{i}.jpg", bytes([i]) * 500_000) for i in range(80)))
    kept = []
    original = ReadOnce.__init__
    monkeypatch.setattr(ReadOnce, "__init__", lambda self, content: (original(self, content), kept.append(self))[0])
    assert len(open_source(options(tmp_path), "train")) == 76
    assert len(kept) == 80 and not any(each._content for each in kept)


def test_images_without_captions_still_train_a_tokenizer(tmp_path):
    entries = [(f"{i}.png", tiny_copies.image(i, kind="PNG")) for i in range(5)]
    tiny_copies.write_tar(tmp_path / "shards" / "0.tar", entries)
    pipeline = Pipeline(options(tmp_path), split="train", train=True, batch_size=4)
    with iter(pipeline) as batches:
        assert next(batches)["image"].shape == (4, 16, 16, 3)
    assert pipeline.skipped() == {}
