"""Image–caption tar shards, as img2dataset and WebDataset write them. Damage is counted and named."""

import gzip
import io
import json
import os
import pickle
import random
import sys
import tarfile
import tracemalloc
import zlib

import pytest
import tiny_copies
from absl import logging

from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.record import UnreadableExample
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.sources.tar_shards import scanning
from dalle_jax.data.sources.tar_shards.reading import DamagedShard, Place, read_samples
from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.token_layout import PaddedIds


def options(tmp_path, path="shards", **others):
    path = path if path.startswith(("~", "file:")) else str(tmp_path / path)
    settings = {"source": "tar_shards", "path": path, "data_dir": str(tmp_path / "data")}
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
    """Keys end at the first dot of the last part. Other endings are counted; folders and capitals are accepted."""
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
    assert [(sample.key, sample.image) for sample in found if sample.image] == [
        ("a.b/x", b"1"),
        ("c/x", b"2"),
        ("c/" + "y" * 200 + "ü", b"3"),
    ]
    assert sorted(ending for sample in found for ending in sample.other_endings) == ["", ".cls", ".y.jpg"]


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
    found, _ = read(tar(tmp_path, members(9)), wanted=lambda key: int(key) % 4 == 1)
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
    keys = [10000 * s + i for s in range(2) for i in range(25)]
    held_out = [key for key in keys if zlib.crc32(f"{key:09}".encode()) < 2**32 / 20]
    assert 1 <= len(held_out) <= 5
    assert files(validation) == [f"{key // 10000:05}.tar/{key:09}" for key in held_out]
    assert files(train) == [f"{key // 10000:05}.tar/{key:09}" for key in keys if key not in held_out]
    assert len(open_source(options(tmp_path), "all")) == 50
    assert "tensorflow" not in sys.modules
    example, first = train[0], next(key for key in keys if key not in held_out)
    assert example["captions"] == [tiny_copies.caption(first, 0)] and example["image"].shape == (60, 72, 3)
    assert train.record(0).image == tiny_copies.sample(first)["jpg"] and f"00000.tar/{first:09}" in example["name"]


def test_folders_are_splits(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        tiny_copies.tar_shards(tmp_path / "shards" / split, shards=1, samples=count)
    assert [len(open_source(options(tmp_path), split)) for split in ("train", "test")] == [3, 2]
    assert len(open_source(options(tmp_path), "validation")) == 2, "the folder test takes its place"
    with pytest.raises(DataError, match="heldout"):
        open_source(options(tmp_path), "heldout")


def test_globs(tmp_path):
    tiny_copies.tar_shards(tmp_path / "shards", shards=3, samples=2)
    assert len(open_source(options(tmp_path, path="shards/0000[12].tar"), "all")) == 4
    assert len(open_source(options(tmp_path, path="sh*/*.tar"), "all")) == 6
    assert len(open_source(options(tmp_path, path="shards/00001.tar"), "all")) == 2


def test_other_shards_are_another_data_set(tmp_path):
    sizes, folder = [], tmp_path / "shards"
    for arguments in ({"shards": 1}, {"shards": 2}, {"shards": 2, "samples": 40}, {"shards": 2, "samples": 40}):
        tiny_copies.tar_shards(folder, **arguments)
        sizes.append(len(open_source(options(tmp_path), "all")))
    assert sizes == [10, 20, 80, 80]


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
    left = [path for path in (tmp_path / "data").glob("tar_shards/*/*") if path.name != ".preparing"]
    assert not left, "a failed preparation leaves no files"


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
    assert len(source) == 21  # of 10 + 6 + 6 one is held out
    assert {found.reason: (found.count, found.names) for found in source.left_out} == {
        "damaged shard": (2, source.left_out[0].names),
        "missing image": (1, ("00003.tar/alone",)),
    }
    assert "00001.tar" in source.left_out[0].names[0] and "6 samples before" in source.left_out[0].names[1]
    model = TextModel.train(source.captions(), 100)
    captions = PaddedIds(model.vocab_size, 24)
    pipeline = Pipeline(options(tmp_path), model, captions, split="train", train=True, batch_size=21, source=source)
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


def test_images_without_captions_still_train_a_tokenizer(tmp_path):
    entries = [(f"{i}.png", tiny_copies.image(i, kind="PNG")) for i in range(5)]
    tiny_copies.write_tar(tmp_path / "shards" / "0.tar", entries)
    pipeline = Pipeline(options(tmp_path), split="train", train=True, batch_size=4)
    with iter(pipeline) as batches:
        assert next(batches)["image"].shape == (4, 16, 16, 3)
    assert pipeline.skipped() == {}


# -- the index ------------------------------------------------------------------------------------------------------


def everything(source):
    return [source.record(i) for i in range(len(source))]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_located_images_are_the_images_that_are_read(tmp_path, mode):
    content = tar(
        tmp_path, [*members(5), ("x.png", b""), ("y.txt", b"alone"), ("c/" + "z" * 200 + ".jpg", b"long")], mode
    )
    whole, places = read(content)[0], read(content, locate=True)[0]
    assert [each.key for each in whole] == [each.key for each in places] and len(whole) == 8
    for image, place in zip((each.image for each in whole), (each.image for each in places)):
        if mode == "w" and image is not None:
            assert isinstance(place, Place) and content[place.offset :][: place.size] == image
        else:
            assert place == image


def test_a_located_image_beyond_the_end_is_damage(tmp_path):
    """The caption stands before its image, so that the sample would look complete."""
    whole = tar(tmp_path, [(f"{i}.{end}", bytes(2000)) for i in range(3) for end in ("txt", "jpg")])
    found, damage = read(whole[: offsets(whole)["2.jpg"][0] + 900], locate=True)
    assert [sample.key for sample in found] == ["0", "1"] and "2 samples before that" in damage


def test_images_stay_in_their_shard(tmp_path):
    noise = random.Random(0)
    entries = [(f"{i}.jpg", noise.randbytes(20_000)) for i in range(40)]
    tiny_copies.write_tar(tmp_path / "shards" / "0.tar", entries)
    source = open_source(options(tmp_path), "all")
    assert sorted(record.image for record in everything(source)) == sorted(content for _, content in entries)
    assert all(source.without_image(i).image == b"" for i in range(40))
    index = tmp_path / "data" / "tar_shards"
    assert sum(path.stat().st_size for path in index.rglob("*") if path.is_file()) < 20_000


def test_images_of_compressed_shards_are_copied(tmp_path):
    entries = members(3)
    tiny_copies.write_tar(tmp_path / "shards" / "0.tar.gz", entries, "w:gz")
    tiny_copies.write_tar(tmp_path / "shards" / "1.tar", [("9" + name, content) for name, content in entries])
    source = open_source(options(tmp_path), "all")
    images = {record.extra["file"]: record.image for record in everything(source)}
    assert len(images) == 6
    for file, image in images.items():
        assert image == tiny_copies.sample(int(file[-1]))["jpg"]
    copied = [path.name for path in (tmp_path / "data").rglob("images/*")]
    assert copied == ["0"]


def test_processes_index_like_one_process(tmp_path, monkeypatch):
    tiny_copies.tar_shards(tmp_path / "shards", shards=3)
    tiny_copies.write_tar(tmp_path / "shards" / "1b.tgz", members(4), "w:gz")
    (tmp_path / "shards" / "2b.tar").write_bytes(b"garbage" * 1000)
    found = []
    for workers, limit in ((0, 2**40), (2, 0)):
        monkeypatch.setattr(scanning, "_WORTH_PROCESSES", limit)
        there = options(tmp_path, data_dir=str(tmp_path / f"data{workers}"), workers=workers)
        sources = [open_source(there, split) for split in ("train", "validation")]
        names = [[record.extra["file"] for record in everything(source)] for source in sources]
        found.append((names, [source.left_out for source in sources], [r.image for r in everything(sources[0])]))
    assert found[0] == found[1]
    assert [each.reason for each in found[0][1][0]] == ["damaged shard"]


def test_a_source_can_be_pickled(tmp_path):
    tiny_copies.tar_shards(tmp_path / "shards", shards=2)
    source = open_source(options(tmp_path), "train")
    content = pickle.dumps(source)
    assert len(content) < 4000 and everything(pickle.loads(content)) == everything(source)


@pytest.mark.parametrize(
    "split, count", [("train[:50%]", 10), ("train[-3:]", 3), ("val+train", 25), ("all", 25), ("validation", 5)]
)
def test_parts_of_splits(tmp_path, split, count):
    for folder, samples in (("train", 20), ("val", 5)):
        tiny_copies.tar_shards(tmp_path / "shards" / folder, shards=1, samples=samples)
    source = open_source(options(tmp_path), split)
    assert len(everything(source)) == len(source) == count
    with pytest.raises(DataError, match="train"):
        open_source(options(tmp_path), "train[5:2]")


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """The options of an indexed set, its records, and the folder of the index."""
    root = tmp_path_factory.mktemp("indexed")
    tiny_copies.tar_shards(root / "shards", shards=2)
    found = everything(open_source(options(root), "all"))
    (facts,) = (root / "data").rglob("index.json")
    return options(root), found, facts.parent


@pytest.mark.parametrize("column", ["places", "firsts", "ends", "strings", "sums"])
def test_a_damaged_index_gives_no_wrong_example(indexed, column):
    settings, right, folder = indexed
    draw = random.Random(column)
    path = folder / "train" / column
    before = path.read_bytes()
    missing = 0
    for _ in range(30):
        content = bytearray(before)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        source = open_source(settings, "all")
        for number, expected in enumerate(right):
            try:
                assert source.record(number) == expected
            except UnreadableExample as error:
                missing += 1
                assert str(folder) in str(error)
    path.write_bytes(before)
    assert missing


@pytest.mark.parametrize("harm", ["half", "gone"])
def test_an_index_with_a_missing_part_names_the_folder(indexed, harm):
    settings, _, folder = indexed
    path = folder / "validation" / "strings"
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2]) if harm == "half" else path.unlink()
    with pytest.raises(DataError, match="index.json"):
        open_source(settings, "train")
    path.write_bytes(before)


@pytest.mark.parametrize("change", [-1, 1])
def test_an_index_with_another_number_of_rows_names_the_folder(indexed, change):
    settings, _, folder = indexed
    before = (folder / "index.json").read_text()
    facts = json.loads(before)
    facts["splits"]["train"] += change
    (folder / "index.json").write_text(json.dumps(facts))
    with pytest.raises(DataError, match="index.json"):
        open_source(settings, "train")
    (folder / "index.json").write_text(before)


def test_a_shard_that_vanishes_is_counted(tmp_path):
    tiny_copies.tar_shards(tmp_path / "shards", shards=1)
    source = open_source(options(tmp_path), "train")
    (tmp_path / "shards" / "00000.tar").write_bytes(b"short")
    with pytest.raises(UnreadableExample, match="00000.tar"):
        source.record(0)
    (tmp_path / "shards" / "00000.tar").unlink()
    with pytest.raises(UnreadableExample, match="00000.tar"):
        source.record(0)
    assert source.captions_of(0)


# -- names, endings, keys -------------------------------------------------------------------------------------------


def test_names_that_hold_dots(tmp_path):
    entries = [(f"photo 1.{i}.{end}", f"{i}{end}".encode()) for i in range(40) for end in ("jpg", "txt")]
    entries += [
        ("v1.2/St. Louis.png", b"a"),
        ("v1.2/St. Louis.txt", b"b"),
        ("v1.2/x.jpg", b"c"),
        ("v1.2/x.jpg.txt", b"d"),
    ]
    found, damage = read(tar(tmp_path, entries))
    assert damage is None
    assert [(s.key, s.image, s.captions) for s in found] == [
        *((f"photo 1.{i}", f"{i}jpg".encode(), (f"{i}txt".encode(),)) for i in range(40)),
        ("v1.2/St. Louis", b"a", (b"b",)),
        ("v1.2/x", b"c", (b"d",)),
    ]


@pytest.mark.parametrize("order", [("seg.png", "jpg", "txt"), ("jpg", "seg.png", "txt"), ("jpg", "txt", "seg.png")])
def test_a_mask_next_to_an_image_is_no_image(tmp_path, order):
    entries = [(f"{key}.{end}", end.encode()) for key in ("a", "b") for end in order]
    found, _ = read(tar(tmp_path, entries))
    assert [(s.key, s.image, s.captions) for s in found] == [("a", b"jpg", (b"txt",)), ("b", b"jpg", (b"txt",))]
    assert [s.other_endings for s in found] == [(".seg.png",)] * 2


@pytest.mark.parametrize(
    "image, text", [("img", "cap"), ("JPG", "TXT"), ("tiff", "caption"), ("jfif", "txt"), ("avif", "txt")]
)
def test_endings(tmp_path, image, text):
    (sample,) = read(tar(tmp_path, [(f"x.{image}", b"image"), (f"x.{text}", b"text")]))[0]
    assert (sample.image, sample.captions) == (b"image", (b"text",))


def test_other_endings_are_counted(tmp_path):
    names = [(f"{i}.{end}", b"x") for i in range(60) for end in ("jpg", "txt", "cls", "heic")]
    tiny_copies.write_tar(tmp_path / "shards" / "0.tar", [*names, ("README", b"")])
    found = {split: open_source(options(tmp_path), split).other_files for split in ("train", "validation", "all")}
    assert found["all"] == {"": 1, ".cls": 60, ".heic": 60}
    assert found["train"][".cls"] + found["validation"][".cls"] == 60


@pytest.mark.parametrize("name", ["text", "title", "captions"])
def test_usual_caption_keys(tmp_path, name):
    assert read(tar(tmp_path, [("x.jpg", b"i"), ("x.json", json.dumps({name: "it"}).encode())]))[0][0].captions == (
        b"it",
    )


def test_the_caption_key_is_an_option(tmp_path):
    facts = {"alt": "long", "inner": {"name": "nested"}, "caption": "usual"}
    entries = [
        (f"{i}.{end}", c)
        for i in range(3)
        for end, c in (("jpg", b"i"), ("txt", b"t"), ("json", json.dumps(facts).encode()))
    ]
    tiny_copies.write_tar(tmp_path / "shards" / "0.tar", entries)
    found = {
        key: list(open_source(options(tmp_path, caption_key=key), "all").captions())
        for key in ("caption", "alt", "inner/name")
    }
    assert found == {"caption": ["t"] * 3, "alt": ["long"] * 3, "inner/name": ["nested"] * 3}
    with pytest.raises(DataError, match="alt, caption, inner"):
        open_source(options(tmp_path, caption_key="absent"), "all")


def test_shards_without_a_caption_name_the_keys_there_are(tmp_path):
    entries = [(f"{i}.{end}", c) for i in range(3) for end, c in (("jpg", b"i"), ("json", b'{"label": "cat"}'))]
    tiny_copies.write_tar(tmp_path / "shards" / "0.tar", entries)
    assert "label" in open_source(options(tmp_path), "all").captions_missing
    tiny_copies.tar_shards(tmp_path / "more", shards=1)
    assert open_source(options(tmp_path, path="more"), "all").captions_missing is None


# -- splits ---------------------------------------------------------------------------------------------------------


def test_samples_never_change_sides(tmp_path):
    """Neither when shards are added, nor when the samples are packed again."""
    entries = lambda count: [(f"{i}.jpg", b"x") for i in range(count)]
    tiny_copies.write_tar(tmp_path / "few" / "0.tar", entries(100))
    for shard in range(3):
        tiny_copies.write_tar(tmp_path / "many" / f"{shard}.tar", entries(150)[50 * shard : 50 * (shard + 1)][::-1])
    keys = {
        (name, split): {file.split("/")[1] for file in files(open_source(options(tmp_path, path=name), split))}
        for name in ("few", "many")
        for split in ("train", "validation")
    }
    for split in ("train", "validation"):
        assert keys["few", split] < keys["many", split]
    assert not keys["many", "train"] & keys["many", "validation"]


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_few_samples_give_both_splits(tmp_path, count):
    tiny_copies.tar_shards(tmp_path / "shards", shards=1, samples=count)
    sizes = {split: len(open_source(options(tmp_path), split)) for split in ("train", "validation")}
    assert sizes["validation"] >= 1 and sizes["train"] >= 1
    assert sum(sizes.values()) == max(count, 2), "a single sample is in both"


@pytest.mark.parametrize("folder", ["all", "part 1", "train"])
def test_a_single_folder_is_no_split(tmp_path, folder):
    tiny_copies.tar_shards(tmp_path / "shards" / folder, shards=1)
    sizes = [len(open_source(options(tmp_path), split)) for split in ("train", "validation", "all")]
    assert sizes[0] + sizes[1] == sizes[2] == 10


def test_folders_that_cannot_be_splits_are_left_out_and_counted(tmp_path):
    for folder, count in (("train", 3), ("val", 2), ("all", 5), ("my shards", 1), (".hidden", 1), ("__MACOSX", 1)):
        tiny_copies.tar_shards(tmp_path / "shards" / folder, shards=1, samples=count)
    train, validation, everything = (open_source(options(tmp_path), s) for s in ("train", "validation", "all"))
    assert [len(train), len(validation), len(everything)] == [3, 2, 5]
    assert [(each.count, each.names) for each in train.left_out] == [(2, ("all", "my shards"))]


# -- paths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["{}", "file://{}", "~/{}", "{}/*.tar", "{}/0000[0].tar"])
def test_spellings_of_a_path(tmp_path, monkeypatch, spelling):
    folder = tiny_copies.tar_shards(tmp_path / "cats [v1] *", shards=1)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = spelling.format(folder.name if "~" in spelling else folder)
    assert len(open_source(options(tmp_path, path=path), "all")) == 10
    assert len(open_source(options(tmp_path, path=path, data_dir=str(tmp_path / "data [v1]")), "all")) == 10


def test_files_of_img2dataset_next_to_the_shards(tmp_path):
    folder = tiny_copies.tar_shards(tmp_path / "shards", shards=2)
    for shard in range(2):
        (folder / f"{shard:05}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05}_stats.json").write_text("{}")
    source = open_source(options(tmp_path, source="auto"), "all")
    assert len(source) == 20 and not source.left_out


# -- limits ---------------------------------------------------------------------------------------------------------


def test_large_members_are_not_read(tmp_path):
    entries = [
        ("a.jpg", b"x" * 5000),
        ("a.txt", b"a"),
        ("b.jpg", b"x" * 100),
        ("b.txt", b"t" * 3000),
        ("b.json", b'{"caption": "b"}'),
    ]
    entries += [(f"{i}.jpg", b"x") for i in range(3)]
    tiny_copies.write_tar(tmp_path / "shards" / "0.tar", entries)
    source = open_source(options(tmp_path, max_file_bytes=2000), "all")
    assert sorted(source.record(i).captions for i in range(len(source))) == [(), (), (), (b"b",)]
    assert {(each.reason, name) for each in source.left_out for name in each.names} == {
        ("file too large", "0.tar/a.jpg"),
        ("file too large", "0.tar/b.txt"),
    }


@pytest.mark.parametrize("kind", ["member", "pax header", "long name"])
def test_archives_that_unpack_to_gigabytes(tmp_path, kind):
    size = 60_000_000
    header = tarfile.TarInfo("a.jpg")
    header.size = size
    header.type = {"member": tarfile.REGTYPE, "pax header": tarfile.XHDTYPE, "long name": tarfile.GNUTYPE_LONGNAME}[
        kind
    ]
    packed = gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(size) + bytes(10240), 1)
    tracemalloc.start()
    found, damage = read(packed, max_bytes=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000
    assert damage or [sample.too_large for sample in found] == [("a.jpg",)]


# -- the prepared copy ----------------------------------------------------------------------------------------------


def captions_of(tmp_path, path="shards"):
    return sorted(open_source(options(tmp_path, path=path), "all").captions())


def shard_of(path, word):
    return tiny_copies.write_tar(
        path, [(f"{i}.{end}", c) for i in range(4) for end, c in (("jpg", b"i"), ("txt", word))]
    )


def test_shards_of_equal_names_and_sizes_are_told_apart(tmp_path):
    """A tar is padded to 10,240 bytes, so that names and sizes say little."""
    for name in ("one", "two"):
        shard_of(tmp_path / name / "0.tar", name.encode())
        os.utime(tmp_path / name / "0.tar", (1, 1))
    assert captions_of(tmp_path, "one") == ["one"] * 4 and captions_of(tmp_path, "two") == ["two"] * 4


@pytest.mark.parametrize("same_time", [True, False])
def test_captions_corrected_in_place_are_seen(tmp_path, same_time):
    shard = shard_of(tmp_path / "shards" / "0.tar", b"wrong")
    before = shard.stat()
    assert captions_of(tmp_path) == ["wrong"] * 4
    shard_of(shard, b"right")
    assert shard.stat().st_size == before.st_size
    if same_time:
        os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert captions_of(tmp_path) == ["right"] * 4


def test_a_copy_that_is_used_again_is_named(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    shard_of(tmp_path / "shards" / "0.tar", b"text")
    captions_of(tmp_path)
    assert not any("delete" in line for line in lines)
    captions_of(tmp_path)
    (line,) = (line for line in lines if "delete" in line)
    assert str(tmp_path / "shards") in line and str(tmp_path / "data" / "tar_shards") in line


def test_preparing_prints_nothing(tmp_path, capfd):
    shard_of(tmp_path / "shards" / "0.tar", b"text")
    captions_of(tmp_path)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("source", ["tar_shards", "shapes_captions", "emoji_captions", "coco_captions", "cub_captions"])
def test_keyword_arguments_of_another_source(tmp_path, source):
    shard_of(tmp_path / "shards" / "0.tar", b"text")
    with pytest.raises(ConfigError, match="builder_kwargs") as caught:
        open_source(options(tmp_path, source=source, builder_kwargs={"wings": 2}), "train")
    assert "wings" in str(caught.value) and "__init__" not in str(caught.value)


def test_messages_begin_with_the_fault(tmp_path):
    with pytest.raises(DataError) as caught:
        open_source(options(tmp_path, path="absent"), "train")
    assert str(caught.value).startswith("data.path is")
