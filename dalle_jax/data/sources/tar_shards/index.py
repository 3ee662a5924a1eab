"""The index of tar shards: where each image is, and its captions. A folder of plain columns, mapped into memory.

    <folder>/index.json       the shards, the splits with their numbers of samples, and what was left out
    <folder>/<split>/places   int64 [n, 3]: number of the file, offset and size of the image
    <folder>/<split>/firsts   int64 [n + 1]: the first of a sample's strings
    <folder>/<split>/ends     int64 [m]: the end of each string in `strings`
    <folder>/<split>/strings  bytes: for each sample its key and its captions
    <folder>/<split>/sums     uint32 [n]: CRC-32 of each row
    <folder>/images/<number>  images of a compressed shard

A file's number is that of its shard. Copied images have the number of their shard plus the number of shards. All are
little-endian. The folder is written under another name and renamed when it is complete.

    n samples    m strings
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dalle_jax.data.sources.tar_shards.reading import Place
from dalle_jax.data.sources.tar_shards.scanning import MAX_KEYS, NAMED, Row, Scan
from dalle_jax.errors import DataError
from dalle_jax.storage import json_files

_COLUMNS = {"places": "<i8", "firsts": "<i8", "ends": "<i8", "strings": "u1", "sums": "<u4"}
_REMEDY = "Delete its folder: the shards are then indexed again."


class DamagedRow(ValueError):
    """A row of the index that changed since it was written."""


@dataclasses.dataclass(frozen=True)
class Facts:
    """The content of index.json.

    Attributes:
      prepared_from: the path that the user gave.
      root: the folder of the shards.
      shards: their paths relative to `root`.
      splits: number of samples of each split.
      left_out: by split and reason, {"count": how many, "names": the first}.
      other_files: by split, the number of members passed over, by ending.
      captions: number of captions.
      metadata_keys: keys of .json files without a caption.
      sizes: size of each file of the folder in bytes, by relative path.
    """

    prepared_from: str
    root: str
    shards: list[str]
    splits: dict[str, int]
    left_out: dict[str, dict[str, Any]]
    other_files: dict[str, dict[str, int]]
    captions: int
    metadata_keys: list[str]
    sizes: dict[str, int]


def read_facts(folder: pathlib.Path) -> Facts:
    """Reads index.json.

    Args:
      folder: the index.

    Raises:
      DataError: it is damaged, or a file of the folder has another size.
    """
    path = folder / "index.json"
    content = json_files.read(path, dict, DataError, _REMEDY)
    try:
        facts = Facts(**content)
        for field in dataclasses.fields(Facts):
            kind = field.type.partition("[")[0]
            if type(content[field.name]).__name__ != kind:
                raise TypeError(f"{field.name} is not of the kind {kind}")
        for name, size in facts.sizes.items():
            if (found := os.stat(folder / name).st_size) != size:
                raise TypeError(f"{name} has {found:,} bytes instead of {size:,}")
        for split, rows in facts.splits.items():
            if facts.sizes.get(f"{split}/places") != 24 * rows:
                raise TypeError(f"{split} does not have {rows} rows")
    except (TypeError, OSError) as error:
        raise DataError(f"{path} is damaged: {error}. {_REMEDY}") from error
    return facts


def write(folder: pathlib.Path, scans: Iterable[tuple[int, Scan]], **facts: Any) -> None:
    """Writes an index.

    Args:
      folder: an existing folder, whose `images` may hold copied images.
      scans: the number of each shard and its samples.
      **facts: `prepared_from`, `root`, `shards` and `left_out` of `Facts`.

    Raises:
      DataError: a split has no sample.
    """
    columns: dict[str, _Writer] = {}
    left_out: dict[str, dict[str, Any]] = facts.pop("left_out")
    other_files: dict[str, collections.Counter] = {}
    captions, keys, count = 0, set(), len(facts["shards"])
    for number, scan in scans:
        captions += scan.captions
        keys |= scan.metadata_keys
        for split, found in scan.splits.items():
            if split not in columns:
                columns[split] = _Writer(folder / split)
            columns[split].add(found.rows, number, count)
            other_files.setdefault(split, collections.Counter()).update(found.other_files)
            for reason, (missing, names) in found.left_out.items():
                one = left_out.setdefault(split, {}).setdefault(reason, {"count": 0, "names": []})
                one["count"] += missing
                one["names"] = (one["names"] + names)[:NAMED]
    for writer in columns.values():
        writer.close()
    for split, writer in columns.items():
        if not writer.rows:
            found = [f"{reason}: {', '.join(each['names'])}" for reason, each in left_out.get(split, {}).items()]
            raise DataError(f"tar_shards: the split {split!r} has no usable example. {'; '.join(found)}".rstrip())
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    content = Facts(
        splits={split: writer.rows for split, writer in columns.items()},
        left_out=left_out,
        other_files={split: dict(found) for split, found in other_files.items()},
        captions=captions,
        metadata_keys=sorted(keys)[:MAX_KEYS],
        sizes={path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
        **facts,
    )
    (folder / "index.json").write_text(json.dumps(dataclasses.asdict(content)))


class _Writer:
    """The columns of one split."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir()
        self._files = {name: open(folder / name, "wb") for name in _COLUMNS}
        self._put("firsts", [0])
        self.rows = self._strings = self._bytes = 0

    def _put(self, name: str, values: Sequence[int] | np.ndarray) -> None:
        self._files[name].write(np.asarray(values, _COLUMNS[name]).tobytes())

    def add(self, rows: Sequence[Row], number: int, shards: int) -> None:
        """Appends the samples of a shard."""
        strings = [[row.key, *row.captions] for row in rows]
        places = np.array([[number + shards * row.copied, *row.place] for row in rows], "<i8").reshape(-1, 3)
        flat = [each for one in strings for each in one]
        self._put("places", places)
        self._put("firsts", self._strings + np.cumsum([len(one) for one in strings], dtype=np.int64))
        self._put("ends", self._bytes + np.cumsum([len(each) for each in flat], dtype=np.int64))
        self._put("sums", [_checksum(place, one) for place, one in zip(places, strings)])
        self._files["strings"].write(b"".join(flat))
        self.rows += len(rows)
        self._strings += len(flat)
        self._bytes += sum(map(len, flat))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _checksum(place: np.ndarray, strings: Sequence[bytes]) -> int:
    lengths = np.array([len(each) for each in strings], "<i8")
    return zlib.crc32(b"".join([place.tobytes(), lengths.tobytes(), *strings]))


class Columns:
    """The samples of one split. Pickling keeps the path only, so that each process maps the files itself."""

    def __init__(self, folder: pathlib.Path):
        """Opens the folder of a split."""
        self._folder = folder
        self._open()

    def _open(self) -> None:
        read = lambda name: np.memmap(self._folder / name, _COLUMNS[name], mode="r")
        self._places, self._firsts, self._sums = read("places").reshape(-1, 3), read("firsts"), read("sums")
        self._ends, self._strings = read("ends"), read("strings")

    def __getstate__(self) -> Mapping[str, Any]:
        return {"_folder": self._folder}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int) -> tuple[int, Place, bytes, tuple[bytes, ...]]:
        """Reads one row.

        Args:
          index: in [0, n).

        Returns:
          Number of the file, place of the image, key, captions.

        Raises:
          DamagedRow: the row changed since it was written.
        """
        place = np.array(self._places[index])
        first, last = map(int, self._firsts[index : index + 2])
        if not 0 <= first < last <= len(self._ends) or last - first > 2**20:
            raise DamagedRow("its strings are missing")
        ends = [int(self._ends[first - 1]) if first else 0, *map(int, self._ends[first:last])]
        key, *captions = (self._strings[start:end].tobytes() for start, end in zip(ends, ends[1:]))
        if _checksum(place, [key, *captions]) != self._sums[index]:
            raise DamagedRow("it changed since it was written")
        return int(place[0]), Place(int(place[1]), int(place[2])), key, tuple(captions)
