"""Damaged JSON is one line that names the file, wherever it is read."""

import os

import pytest

from dalle_jax.errors import DataError
from dalle_jax.storage import json_files

DAMAGED = {
    "empty": b"",
    "blank": b" \n",
    "null": b"null",
    "number": b"7",
    "text": b'"x"',
    "NaN": b"NaN",
    "truncated": b'{"a": 1, "b',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "NULs": b"\0" * 512,
    "brackets": b"[" * 100_000,
    "closed brackets": b"[" * 100_000 + b"]" * 100_000,
    "braces": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "two": b"{} {}",
}


def put(path, damage):
    """Puts something damaged in the place of a file: a name of `DAMAGED`, "list", "folder", "pipe" or "missing"."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if damage == "folder":
        path.mkdir()
    elif damage == "pipe":
        os.mkfifo(path)
    elif damage != "missing":
        path.write_bytes({"list": b"[]", **DAMAGED}[damage])


@pytest.mark.parametrize("damage", [*DAMAGED, "list", "folder", "pipe", "missing"])
def test_a_damaged_file(tmp_path, damage):
    put(tmp_path / "a.json", damage)
    with pytest.raises(DataError, match=r"a\.json") as error:
        json_files.read(tmp_path / "a.json", dict, DataError, "Write it again.")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500 and str(error.value).endswith("Write it again.")


def test_both_kinds(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert json_files.read(tmp_path / "a.json", dict, DataError, "") == {"a": [1]}
    assert json_files.parse("[1]", list) == [1]
    with pytest.raises(json_files.WrongJson, match="object"):
        json_files.parse("{}", list)
