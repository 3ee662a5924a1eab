"""Tests of files with a checksum next to them."""

import random
import shutil
import subprocess

import pytest

from dalle_jax.data.byte_pairs import BytePairs
from dalle_jax.data.text import TextModel
from dalle_jax.errors import DamagedError
from dalle_jax.storage import checksummed

CAPTIONS = ["a red circle above a blue square", "a green star"]


def test_round_trip(tmp_path):
    checksummed.write(tmp_path / "new" / "file", b"content")
    assert checksummed.read(tmp_path / "new" / "file") == b"content"
    with pytest.raises(OSError):
        checksummed.read(tmp_path / "missing")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum here")
def test_sha256sum_checks_the_file(tmp_path):
    checksummed.write(tmp_path / "file", b"content")
    assert subprocess.run(["sha256sum", "-c", "file.sha256"], cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", ["file", "file.sha256"])
def test_every_harm_is_noticed(tmp_path, name):
    content = random.Random(0).randbytes(1000)
    checksummed.write(tmp_path / "file", content)
    stored = (tmp_path / name).read_bytes()
    flips = [stored[:i] + bytes([stored[i] ^ 1 << i % 8]) + stored[i + 1 :] for i in range(64)]
    for harmed in (*flips, b"", stored[:30], bytes(len(stored)), stored[1:] + stored[:1]):
        (tmp_path / name).write_bytes(harmed)
        with pytest.raises(DamagedError, match="file is damaged"):
            checksummed.read(tmp_path / "file")


def test_a_file_without_a_checksum(tmp_path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "file").write_bytes(b"content")
    assert checksummed.read(tmp_path / "file") == checksummed.read(tmp_path / "file") == b"content"
    assert caplog.text.count(str(tmp_path / "file")) == 1


def test_a_text_model_with_flipped_bits(tmp_path):
    path = tmp_path / "text" / "sentencepiece.model"
    TextModel.train(CAPTIONS, 40, path)
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(50):
        harmed = bytearray(content)
        harmed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(harmed)
        with pytest.raises(DamagedError, match="sentencepiece.model"):
            TextModel.load(path)


def test_a_vocabulary_with_a_flipped_bit(tmp_path):
    checksummed.write(tmp_path / "text.model", b"{}")
    (tmp_path / "text.model").write_bytes(b"{]")
    with pytest.raises(DamagedError, match="text.model"):
        BytePairs(tmp_path / "text.model")
