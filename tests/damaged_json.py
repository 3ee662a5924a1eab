"""Contents of JSON files that a fault can leave, for tests of their readers."""

import os

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
