"""Reads a captions table: `captions.jsonl`, `captions.csv`, or `metadata.jsonl` and `metadata.csv` of `imagefolder`.

Each row names an image and holds a caption or a list of captions. A row that cannot be used is left out, counted and
named. An error is raised only for a table in which no row can be used.
"""

from __future__ import annotations

import collections
import functools
import posixpath
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from dalle_jax.data.sources.folder.csv_rows import csv_rows
from dalle_jax.data.sources.folder.endings import IMAGE_ENDINGS, ending
from dalle_jax.data.sources.folder.listing import Skip
from dalle_jax.errors import DataError
from dalle_jax.storage import json_files

# The names of a captions table. If a folder holds several, the first one is read.
TABLES = ("captions.jsonl", "captions.csv", "metadata.jsonl", "metadata.csv")
FILE_KEYS = ("file", "file_name", "filename", "image", "path")
CAPTION_KEYS = ("captions", "caption", "text", "title", "description")

DAMAGED_ROW = "damaged row"
NO_FILE = "row without a file name"
OUTSIDE = "row with a name outside the folder"
NO_IMAGE = "row with a file that is no image"
MISSING_FILE = "missing file"
NO_TEXT = "caption that is no text"

_LIST_COLUMN, _SEPARATOR = "captions", "|"  # a column of a CSV table that holds several captions
_MOST_KEYS_NAMED = 20


class Row(NamedTuple):
    """A usable row.

    Attributes:
      file: name of the image relative to the listed folder.
      captions: zero or more, as text or as bytes that are not UTF-8.
    """

    file: str
    captions: tuple[str | bytes, ...]


class Table(NamedTuple):
    """A table that was read.

    Attributes:
      rows: the usable rows in their order.
      named: the images that a row names, usable or not.
      skipped: what was left out.
    """

    rows: list[Row]
    named: set[str]
    skipped: list[Skip]


def read_table(
    table: str,
    content: bytes,
    images: Collection[str],
    files: Collection[str],
    image_key: str | None = None,
    caption_key: str | None = None,
) -> Table:
    """Reads a captions table.

    Args:
      table: its name relative to the listed folder; the names in it are relative to the table's folder.
      content: its bytes, UTF-8 with or without a byte order mark.
      images: the names of the images in the table's folder and below.
      files: the names of all files. One without an ending may be an image.
      image_key: the key of the file name; None for the usual ones.
      caption_key: the key of the caption; None for the usual ones.

    Raises:
      DataError: if no row can be used. It lists the keys that were found.
    """
    reader = _Reader(table, images, files, image_key, caption_key)
    reader.read(content)
    return Table(reader.rows, reader.named, reader.skipped)


class _Reader:
    """The state of `read_table`."""

    def __init__(self, table, images, files, image_key, caption_key):
        self._table, self._images, self._files = table, images, files
        self._folder = table[: table.rfind("/") + 1]
        self._is_csv = table.lower().endswith(".csv")
        self._file_keys = FILE_KEYS if image_key is None else (image_key.lower(),)
        self._caption_keys = CAPTION_KEYS if caption_key is None else (caption_key.lower(),)
        self._keys: dict[str, None] = {}  # an ordered set
        self.rows: list[Row] = []
        self.named: set[str] = set()
        self.skipped: list[Skip] = []

    def read(self, content: bytes) -> None:
        # A row that is not UTF-8 must cost one example, not the whole table: see `_raw`.
        text = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff")
        if self._is_csv:
            found = csv_rows(text, (*self._file_keys, *self._caption_keys), self._looks_like_a_file)
        else:
            found = _jsonl_rows(text)
        for line, cells, fault in found:
            self._keys.update(dict.fromkeys(cells))
            if fault:
                values = (self._name(cell) for key in self._file_keys if (cell := cells.get(key)))
                self._skip(DAMAGED_ROW, line, fault, next(filter(None, values), None))
            elif (file := self._file(line, cells)) and (captions := self._captions(line, cells, file)) is not None:
                self.named.add(file)
                self.rows.append(Row(file, captions))
        self._check()

    def _skip(self, reason: str, line: int, found: Any, place: str | None = None) -> None:
        self.skipped.append(Skip(reason, f"{self._table} line {line}: {_short(found)}", place or self._table))
        if place in self._images:
            self.named.add(place)

    def _looks_like_a_file(self, cell: str) -> bool:
        return self._name(cell) is not None or ending(cell) in IMAGE_ENDINGS

    def _name(self, given: str) -> str | None:
        """Returns the image that a row calls `given`, or None. Only listed files count: no name leaves the folder."""
        for spelling in (given, given.replace("\\", "/")):
            name = self._folder + posixpath.normpath(spelling)
            if name in self._images or (name in self._files and not ending(name)):
                return name
        return None

    def _file(self, line: int, row: Mapping[str, Any]) -> str | None:
        values = [row[key] for key in self._file_keys if key in row]
        given = next((value.strip() for value in values if isinstance(value, str) and value.strip()), None)
        if given is None:
            self._skip(NO_FILE, line, values[0] if values else ", ".join(row) or "no keys")
            return None
        parts = given.replace("\\", "/").split("/")
        if not parts[0] or parts[0].endswith(":") or ".." in parts:
            self._skip(OUTSIDE, line, given)
            return None
        if (name := self._name(given)) is not None:
            return name
        name = self._folder + posixpath.normpath(given)
        is_there = name in self._files or name in self._folders
        self._skip(NO_IMAGE if is_there else MISSING_FILE, line, given, name)
        return None

    @functools.cached_property
    def _folders(self) -> set[str]:
        return {file[:at] for file in self._files for at in range(len(file)) if file[at] == "/"}

    def _captions(self, line: int, row: Mapping[str, Any], file: str) -> tuple[str | bytes, ...] | None:
        """Returns a row's captions, () if it has none, and None if it has no caption that is a text."""
        key = next((key for key in self._caption_keys if not _is_empty(row.get(key))), None)
        if key is None:
            return ()
        given = row[key] if isinstance(row[key], list) else [row[key]]
        if self._is_csv and key == _LIST_COLUMN:
            given = row[key].split(_SEPARATOR)
        for caption in given:
            if not isinstance(caption, str):
                self._skip(NO_TEXT, line, caption, file)
        return tuple(_raw(caption) for caption in given if isinstance(caption, str)) or None

    def _check(self) -> None:
        keys = ", ".join(repr(key) for key in list(self._keys)[:_MOST_KEYS_NAMED]) or "none"
        advice = "Rename the table if it holds no captions."
        if self._keys and not any(key in self._keys for key in self._file_keys):
            raise DataError(
                f"{self._table} has no column with the file names: expected one of {', '.join(self._file_keys)}; "
                f"found {keys}. Name the columns in the first line, or set data.image_key. {advice}"
            )
        if self._keys and not any(key in self._keys for key in self._caption_keys):
            raise DataError(
                f"{self._table} has no captions: expected one of {', '.join(self._caption_keys)}; found {keys}. "
                f"Set data.caption_key to the column that holds them. {advice}"
            )
        if not self.rows:
            counts = collections.Counter(skip.reason for skip in self.skipped)
            first = f" The first one is {self.skipped[0].label}." if self.skipped else ""
            reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.items()) or "no rows"
            raise DataError(f"{self._table} has no usable row ({reasons}). Its keys are {keys}.{first} {advice}")


def _jsonl_rows(text: str) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yields (line, object with keys in lower case, fault) of every line that is not blank.

    Only a line feed ends a line, because a text may hold U+2028 or U+0085.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json_files.parse(line)
            except json_files.WrongJson as error:
                yield number, {}, str(error)
                continue
            yield number, {key.strip().lower(): value for key, value in row.items()}, ""


def _is_empty(value: Any) -> bool:
    """Whether a caption is absent: null, NaN (as pandas writes it), an empty text or list."""
    return value is None or value == [] or value != value or (isinstance(value, str) and not value.strip())


def _raw(caption: str) -> str | bytes:
    """Returns the text, or undecodable bytes if it stands for bytes that were not UTF-8."""
    try:
        caption.encode("utf-8")
        return caption
    except UnicodeEncodeError:
        return caption.encode("utf-8", "surrogatepass")


def _short(found: Any) -> str:
    text = " ".join(found.split()) if isinstance(found, str) else repr(found)
    return (text if len(text) <= 80 else f"{text[:80]}…").encode("utf-8", "backslashreplace").decode()
