"""Files appear whole, killed writers leave nothing for long, and a full disk is one line."""

import fcntl
import signal
import subprocess
import sys

import pytest
from full_disk import fill_disk, needs_full_device

from dalle_jax.errors import ConfigError, UserError
from dalle_jax.storage.files import make_workdir, remove_unfinished, write_atomically, write_file, write_json

LEFT = "a.png.0123abcd.unfinished"


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").symlink_to(tmp_path / "outside")
    write_file(tmp_path / "folder" / "a", "ä")
    assert (tmp_path / "outside").read_text() == "mine"
    assert (tmp_path / "folder" / "a").read_bytes() == "ä".encode() and not (tmp_path / "folder" / "a").is_symlink()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, error):
    def fail(*_):
        raise error

    write_atomically(tmp_path / "a", b"old")
    monkeypatch.setattr("dalle_jax.storage.file_lock.fcntl.flock", lambda *_: None)
    monkeypatch.setattr("etils.epath.gpath.PosixGPath.replace", fail)
    with pytest.raises(type(error) if isinstance(error, OSError) else error):
        write_atomically(tmp_path / "a", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"old"


def test_only_what_killed_writers_left_is_removed(tmp_path):
    kept = ["a.png", "notes.unfinished", "a.0123abcd.unfinished.txt", ".0123abcd.unfinished", "a.0123ABCD.unfinished"]
    for folder in (tmp_path, tmp_path / "samples", tmp_path / "samples" / "deeper"):
        folder.mkdir(exist_ok=True)
        for name in (LEFT, *kept):
            (folder / name).write_text("x")
    (tmp_path / "samples" / "b.0123abcd.unfinished").symlink_to(tmp_path / "a.png")
    (tmp_path / "c.0123abcd.unfinished").mkdir()
    make_workdir(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*kept, "samples", "c.0123abcd.unfinished"}
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {*kept, "deeper", "b.0123abcd.unfinished"}
    assert (tmp_path / "samples" / "deeper" / LEFT).exists()


def test_a_file_that_is_being_written_stays(tmp_path):
    with open(tmp_path / LEFT, "xb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        remove_unfinished(tmp_path)
        assert (tmp_path / LEFT).exists()
    remove_unfinished(tmp_path)
    assert not (tmp_path / LEFT).exists()


_WRITER = """
import sys
from dalle_jax.storage.files import write_atomically
print("ready", flush=True)
while True:
    for letter in b"ab":
        write_atomically(sys.argv[1], bytes([letter]) * 2_000_000)
"""


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a"
    for pause in (0.003, 0.011, 0.007):
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, path], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            writer.wait(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert not path.exists() or path.read_bytes() in (b"a" * 2_000_000, b"b" * 2_000_000)
        remove_unfinished(tmp_path)
        assert [inside.name for inside in tmp_path.iterdir()] in ([], ["a"])


@needs_full_device
def test_a_full_disk_names_the_file_and_the_space(tmp_path, monkeypatch):
    fill_disk(monkeypatch, "report.json")
    with pytest.raises(UserError, match=r"report\.json.*13 bytes needed, [\d,]+ left"):
        write_json(tmp_path / "report.json", {"a": 1})
    assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file"):
        make_workdir(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
