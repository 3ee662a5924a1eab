"""A folder of images with captions.

The captions are either in text files next to the images (`cat.png` + `cat.txt`, one caption per line) or in one
`captions.jsonl` or `captions.csv` at the top. The rows of such a table name a file ("file", "file_name" or "image") and
hold "caption" (one text) or "captions" (a list; in a CSV file, separated by "|").

Splits: a sub-folder with the split's name and its own captions is that split. Otherwise a fixed twentieth of the folder
is "validation", the rest is "train", and "all" is everything. A hash of the names selects this twentieth, so that
copying the files does not change it.
"""

from __future__ import annotations

import csv
import io
import json
import zlib
from collections.abc import Iterator

from etils import epath

from dalle_jax.data.sources.source import Record, Source, UnreadableExample
from dalle_jax.errors import DataError

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_FILE_KEYS = ("file", "file_name", "image")
_VALIDATION_SHARE = 20


class FolderSource(Source):
    """The images of a folder, in the order of their names or of the rows of the captions table."""

    def __init__(self, path: epath.PathLike, split: str = "all"):
        """Lists the folder; images and text files are read on request.

        Args:
          path: the folder, local or remote.
          split: "train", "validation", "all", or the name of a sub-folder.

        Raises:
          DataError: if the folder does not exist or holds no images, or if its captions table is malformed.
        """
        root = epath.Path(path)
        if not root.is_dir():
            raise DataError(f"data.path is {path}, which is not a folder: give the folder with the images.")
        if (root / split).is_dir():
            root, split = root / split, "all"
        self._root = root
        self.description = f"{root} ({split})"
        entries = _entries(root)
        if not entries:
            raise DataError(f"{root} holds no images ({', '.join(_IMAGES)}) and no captions.jsonl or captions.csv.")
        self._entries = _choose(entries, split, root)

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, index: int) -> Record:
        file, captions = self._entries[index]
        try:
            image = (self._root / file).read_bytes()
        except OSError as error:
            raise UnreadableExample("missing file", file, str(error)) from error
        if captions is None:
            text = (self._root / file).with_suffix(".txt")
            try:
                captions = tuple(text.read_bytes().splitlines())
            except OSError:
                captions = ()
        return Record(image, captions, file, {})


def _entries(root: epath.Path) -> list[tuple[str, tuple[str | bytes, ...] | None]]:
    """Returns (file, captions) of every image; captions is None if they are in a text file next to the image."""
    for name, rows in (("captions.jsonl", _jsonl_rows), ("captions.csv", _csv_rows)):
        table = root / name
        if table.exists():
            # A row that is not UTF-8 must cost one example, not the whole table: see _raw.
            content = table.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")
            return [_entry(row, number, table) for number, row in rows(content, table)]
    return [(name, None) for name in sorted(_images(root))]


def _images(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """Yields the names of all images below a folder, one level at a time as epath requires for remote folders."""
    for entry in folder.iterdir():
        if entry.suffix.lower() in _IMAGES:
            yield prefix + entry.name
        elif entry.suffix != ".txt" and entry.is_dir():
            yield from _images(entry, f"{prefix}{entry.name}/")


def _jsonl_rows(content: str, table: epath.Path):
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise DataError(f"{table}, line {number} is not a JSON object: {error}.") from error


def _csv_rows(content: str, table: epath.Path):
    for number, row in enumerate(csv.DictReader(io.StringIO(content, newline="")), 2):
        if isinstance(row.get("captions"), str):
            row["captions"] = row["captions"].split("|")
        yield number, row


def _entry(row, number: int, table: epath.Path) -> tuple[str, tuple[str | bytes, ...]]:
    file, captions = None, []
    if isinstance(row, dict):
        file = next((row[key] for key in _FILE_KEYS if row.get(key)), None)
        captions = row.get("captions") or row.get("caption") or []
    captions = captions if isinstance(captions, list) else [captions]
    if not isinstance(file, str) or not all(isinstance(caption, str) for caption in captions):
        raise DataError(
            f"{table}, row {number}: expected a file ({', '.join(_FILE_KEYS)}) and 'caption' (a text) or "
            f"'captions' (a list of texts), found {repr(row)[:200]}."
        )
    return file, tuple(_raw(caption) for caption in captions)


def _raw(caption: str) -> str | bytes:
    """Returns the text, or undecodable bytes if it stands for bytes that were not UTF-8."""
    try:
        caption.encode("utf-8")
        return caption
    except UnicodeEncodeError:
        return caption.encode("utf-8", "surrogatepass")


def _choose(entries: list, split: str, root: epath.Path) -> list:
    if split == "all":
        return entries
    by_hash = sorted(range(len(entries)), key=lambda i: (zlib.crc32(entries[i][0].encode()), i))
    held_out = set(by_hash[: max(1, len(entries) // _VALIDATION_SHARE)])
    if split == "validation":
        return [entry for i, entry in enumerate(entries) if i in held_out]
    if split == "train":
        # A single image cannot be divided, so it is in both splits.
        return [entry for i, entry in enumerate(entries) if i not in held_out] or entries
    raise DataError(
        f"{root} has no split {split!r}: create a sub-folder with that name, or use 'train', 'validation' or 'all'."
    )
