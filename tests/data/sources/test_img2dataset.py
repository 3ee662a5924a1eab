"""Reads what img2dataset 1.47.0 writes: 300 addresses, 80 in each shard, one of them missing on the server."""

import io
import json
import tarfile

import pytest
import tiny_copies

from dalle_jax.configuration import config_files
from dalle_jax.data.sources.once import opened_once
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import DataError
from dalle_jax.jobs import data as data_job

SAMPLES, PER_SHARD, MISSING, WITHOUT_CAPTION = 24, 8, 5, 9


def facts(number, caption):
    """The row of a sample, in the order of its keys. Numbers have seven digits with 80 samples in a shard."""
    key = f"{10 * (number // PER_SHARD) + number % PER_SHARD:07}"
    found = {"licence": "GPL", **caption, "url": f"http://127.0.0.1:44335/a%20{number}.png", "key": key}
    found |= {"status": "success", "error_message": None, "width": 72, "height": 60}
    return found | {"original_width": 200, "original_height": 136, "exif": "{}", "sha256": f"{number:064x}"}


def add(archive, name, content):
    """Adds a member as WebDataset does: sorted by ending within a sample, read-only, with an extended header."""
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = len(content), 1764254400.5, 0o444
    member.uname = member.gname = "bigdata"
    archive.addfile(member, io.BytesIO(content))


def write(root, output="webdataset", captions=True):
    """Writes `root` as img2dataset does, and returns it."""
    root.mkdir(parents=True)
    (root / "_tmp").mkdir()  # it is removed at the end of a run that is not interrupted
    (root / "_tmp" / "0.feather").write_bytes(b"ARROW1")
    for shard in range(SAMPLES // PER_SHARD):
        name = f"{shard:05}"
        with tarfile.open(root / f"{name}.tar", "w") as archive:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                if number == MISSING:
                    continue
                text = None if number == WITHOUT_CAPTION else f"A thing (number {number})."
                row = facts(number, {"caption": text} if captions else {})
                sample = {"jpg": tiny_copies.image(number), "json": json.dumps(row, indent=4).encode()}
                if captions:
                    sample["txt"] = (text or "").encode()
                for ending, content in sample.items():
                    add(archive, f"{row['key']}.{ending}", content)
        if output == "files":
            with tarfile.open(root / f"{name}.tar") as archive:
                archive.extractall(root / name, filter="data")
            (root / f"{name}.tar").unlink()
        (root / f"{name}.parquet").write_bytes(b"PAR1\x15\x00PAR1")
        stats = {"count": PER_SHARD, "successes": PER_SHARD, "failed_to_download": 0, "status_dict": {"success": 8}}
        (root / f"{name}_stats.json").write_text(json.dumps(stats, indent=4))
    return root


def options(tmp_path, **others):
    return DataOptions(
        **{"source": "auto", "path": str(tmp_path / "set"), "data_dir": str(tmp_path / "data"), **others}
    )


@pytest.mark.parametrize(("output", "source"), [("webdataset", "tar_shards"), ("files", "folder")])
def test_the_look_at_the_set(tmp_path, output, source):
    """Nothing but the path is given."""
    config = config_files.load("configs/data.py")
    config.data.path, config.data.data_dir = str(write(tmp_path / "set", output)), str(tmp_path / "data")
    found = data_job.run(config, str(tmp_path / "look"))
    assert found.source == source
    assert sum(split.examples for split in found.splits.values()) == SAMPLES - 1
    assert sum(split.captions for split in found.splits.values()) == SAMPLES - 2
    assert found.images.largest == found.images.smallest == (72, 60)
    left_out = [split.left_out for split in found.splits.values()]
    assert [each for each in left_out if each] == [{"empty caption": 1}]


def test_samples_keep_their_captions_and_names(tmp_path):
    write(tmp_path / "set")
    source = open_source(options(tmp_path), "all")
    assert source.left_out == () and len(source) == SAMPLES - 1
    expected = [number for number in range(SAMPLES) if number != MISSING]
    for index, number in enumerate(expected):
        assert source.captions_of(index) == ([] if number == WITHOUT_CAPTION else [f"A thing (number {number})."])
        assert facts(number, {})["key"] in source.record(index).extra["file"]
    other = open_source(options(tmp_path, caption_key="url"), "all")
    assert other.captions_of(3) == [facts(3, {})["url"]]


def test_shards_without_captions(tmp_path):
    """Written without --caption_col. A prior cannot be trained on them, unless a key of the JSON is one."""
    write(tmp_path / "set", captions=False)
    source = open_source(options(tmp_path), "train")
    assert "licence" in source.captions_missing and "caption_key" in source.captions_missing
    config = config_files.load("configs/prior.py:small")
    config.data.path, config.data.data_dir = str(tmp_path / "set"), str(tmp_path / "data")
    with pytest.raises(DataError, match="caption_key"):
        data_job.look_at(config, str(tmp_path / "run"))
    assert open_source(options(tmp_path, caption_key="licence"), "train").captions_of(0) == ["GPL"]


def test_the_copy_is_named_once(tmp_path, caplog):
    write(tmp_path / "set")
    open_source(options(tmp_path), "train")
    with caplog.at_level("INFO"), opened_once():
        for split in ("train", "validation"):
            open_source(options(tmp_path), split)
    assert len([line for line in caplog.messages if "prepared on" in line]) == 1
