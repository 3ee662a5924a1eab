"""The files of a folder: which are read, which are left out, and that listing ends."""

import os
import socket
import time

import PIL.Image
import pytest
from etils import epath
from image_folder import fill, labels, left_out, names, opened
from object_storage import emulated_bucket

from dalle_jax.data.sources.folder import FolderSource, endings
from dalle_jax.data.sources.record import UnreadableExample
from dalle_jax.errors import DataError


def test_endings_that_pillow_reads(tmp_path):
    """JPEG, TIFF, JPEG 2000 and AVIF have several endings; letters may be capitals."""
    kinds = {"a.JPE": "JPEG", "b.jfif": "JPEG", "c.tif": "TIFF", "d.TIFF": "TIFF", "e.jp2": "JPEG2000", "f.gif": "GIF"}
    for name, kind in kinds.items():
        PIL.Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / name, kind)
    source = opened(fill(tmp_path, "g.PNG h.avif"))
    assert names(source) == [*kinds, "g.PNG", *(["h.avif"] if ".avif" in endings.readable_endings() else [])]
    assert all(source.record(index).image for index in range(len(source)))


def test_other_files_are_counted_by_ending(tmp_path):
    """Also images that Pillow cannot read, and texts that belong to no image."""
    others = dict.fromkeys(("b.svg", "c.SVG", "d.heic", "e.img", "f.tar.gz", "g.txt", "README"), "x")
    source = opened(fill(tmp_path, "a.png", {"a.txt": "A cat.", **others}))
    counts = {".svg": 2, ".gz": 1, ".heic": 1, ".img": 1, ".txt": 1, "no ending": 1}
    assert names(source) == ["a.png"] and dict(source.other_files) == counts


def test_a_format_that_this_pillow_lacks_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("PIL.features.check", lambda name: name != "webp")
    endings.readable_endings.cache_clear()
    try:
        source = opened(fill(tmp_path, "a.webp b.png"))
        assert names(source) == ["b.png"] and source.other_files == {".webp": 1}
    finally:
        endings.readable_endings.cache_clear()


def test_hidden_files_and_those_of_programs_are_left_out(tmp_path):
    hidden = ".thumbnails/a.png .ipynb_checkpoints/a.png __MACOSX/a.png b/@eaDir/a.png ._a.png .hidden.png"
    source = opened(fill(tmp_path, f"a.png b/a.png {hidden}", {"Thumbs.db": "x", "b/.DS_Store": "x"}))
    assert names(source) == ["a.png", "b/a.png"] and not source.other_files
    assert left_out(source) == {"hidden folder": 4} and "b/@eaDir" in labels(source)


def test_a_link_to_the_folder_itself_is_left_out(tmp_path):
    fill(tmp_path, "a.png b/c.png")
    (tmp_path / "b" / "self").symlink_to(tmp_path)
    (tmp_path / "b" / "here").symlink_to(".")
    source = opened(tmp_path)
    assert names(source) == ["a.png", "b/c.png"]
    assert left_out(source) == {"link to a folder that is listed already": 2} and "b/self" in labels(source)


def test_two_links_that_lead_to_each_other_end(tmp_path):
    """Each of two folders outside has a link to the other one."""
    root, one, two = (fill(tmp_path / name, f"{name}.png") for name in ("root", "one", "two"))
    (one / "x").symlink_to(two)
    (two / "y").symlink_to(one)
    (root / "link").symlink_to(one)
    (root / "again").symlink_to(one)
    source = opened(root)
    assert names(source) == ["again/one.png", "again/x/two.png", "root.png"]
    assert left_out(source) == {"link to a folder that is listed already": 2}


def test_a_link_to_a_folder_above_is_left_out(tmp_path):
    """It would read everything that stands next to the folder."""
    root = fill(tmp_path / "mine", "a.png")
    fill(tmp_path, "b.png other/c.png")
    (root / "up").symlink_to(tmp_path)
    assert names(opened(root)) == ["a.png"] and "up" in labels(opened(root))


def test_a_folder_is_listed_under_its_own_name_if_it_has_one(tmp_path):
    fill(tmp_path, "z/a.png")
    (tmp_path / "b").symlink_to(tmp_path / "z")
    assert names(opened(tmp_path)) == ["z/a.png"]


def test_only_regular_files_are_opened(tmp_path):
    root = fill(tmp_path / "root", "a.png")
    outside = fill(tmp_path / "elsewhere", "b.png") / "b.png"
    (root / "b.png").symlink_to(outside)
    (root / "device.png").symlink_to("/dev/zero")
    (root / "gone.png").symlink_to(root / "nothing.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    os.mkfifo(root / "captions.csv")
    os.mkfifo(root / "a.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "s.png"))
        source = opened(root)
    assert names(source) == ["a.png", "b.png"], "a link to a regular file is read, wherever the file is"
    assert left_out(source) == {"not a regular file": 7}
    assert source.record(1).image == outside.read_bytes()


def test_a_folder_without_rights_costs_only_its_images(tmp_path, monkeypatch):
    fill(tmp_path, "a.png locked/b.png")
    scan = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the tests may run as root, who may read everything
    source = opened(tmp_path)
    assert names(source) == ["a.png"] and left_out(source) == {"unreadable folder": 1} and "locked" in labels(source)
    with pytest.raises(DataError, match="data.path"):
        opened(tmp_path / "locked")


def test_names_that_are_not_utf8_are_left_out(tmp_path):
    fill(tmp_path, "a.png ü.png")
    with open(os.fsencode(tmp_path) + b"/\xff.png", "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    source = opened(tmp_path)
    assert names(source) == ["a.png", "ü.png"] and left_out(source) == {"name that is not UTF-8": 1}
    assert "\\xff.png" in labels(source)


def test_spellings_of_the_path(tmp_path, monkeypatch):
    fill(tmp_path / "my images", "a.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my images"
    for path in ("~/my images", f"file://{folder}", folder.as_uri(), "my images", f"{folder}/", epath.Path(folder)):
        assert names(FolderSource(path)) == ["a.png"], path


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(DataError, match="data.path"):
        opened(tmp_path / "absent")
    with pytest.raises(DataError, match="nothing"):
        opened(tmp_path)
    fill(tmp_path, ".hidden/a.png", {"a.svg": "x", "0.tar": "x"})
    with pytest.raises(DataError, match="1 .svg") as caught:
        opened(tmp_path)
    assert "tar_shards" in str(caught.value) and "1 hidden folder (.hidden)" in str(caught.value)


def test_a_remote_folder():
    with emulated_bucket() as bucket:
        for name in ("a.png", "b/c.jpg", "b/.thumbs/d.png", "e.svg", "b/c.txt"):
            (bucket / "images" / name).write_bytes(b"content")
        source = opened(bucket / "images")
        assert names(source) == ["a.png", "b/c.jpg"] and left_out(source) == {"hidden folder": 1}
        assert source.other_files == {".svg": 1} and source.identity is None
        assert source.record(1).captions == (b"content",)


def test_many_files_are_listed_quickly(tmp_path):
    for folder in range(50):
        (tmp_path / str(folder)).mkdir()
        for number in range(100):
            (tmp_path / str(folder) / f"{number}.png").touch()
    begun = time.process_time()
    assert len(opened(tmp_path, "train", caption_from="folder_names")) > 4500
    assert time.process_time() - begun < 2, "5,000 files take a tenth of a second on an idle machine"


def test_large_files_are_not_read(tmp_path):
    fill(tmp_path, "a.png b.png", {"a.txt": "x" * 2000, "b.txt": "x", "big.png": b"x" * 2000})
    source = opened(tmp_path, max_file_bytes=1000)
    for index, name in enumerate(("a.txt", None, "big.png")):
        if name:
            with pytest.raises(UnreadableExample, match=f"{name}: file too large"):
                source.record(index)
    assert source.record(1).captions == (b"x",)
