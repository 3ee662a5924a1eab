"""Tar shards as a source. Images are read in place, through an index that the first use creates."""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import os
import pathlib
import shutil
import tempfile
import time
import types

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from dalle_jax.data.builders.made_from import fingerprint
from dalle_jax.data.builders.turn import only_one_prepares
from dalle_jax.data.sources.once import once
from dalle_jax.data.sources.record import Record, UnreadableExample
from dalle_jax.data.sources.source import DEFAULT_DATA_DIR, DataOptions, Source, sum_left_out
from dalle_jax.data.sources.tar_shards import index, scanning
from dalle_jax.data.sources.tar_shards.listing import Shards, find_shards
from dalle_jax.data.sources.tar_shards.reading import Place
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.storage.files import is_remote

_NAME, _VERSION = "tar_shards", "3.0.0"
_VALIDATION = ("val", "valid", "dev", "test")  # other names of the folder with the validation split


class ShardsSource(Source):
    """Image–caption tar shards. It is picklable, so that each worker process can hold a copy."""

    def __init__(self, options: DataOptions, split: str):
        """Opens the shards, and first indexes them if needed.

        Args:
          options: what to read.
          split: a split in TFDS's notation ("train", "train[:90%]", "val+test", "all", …). "validation" may be a folder
            of another name.

        Raises:
          ConfigError: `builder_kwargs` are given, which shards do not have.
          DataError: there are no shards, none of their samples can be used, or there is no such split.
        """
        if options.builder_kwargs:
            raise ConfigError(
                f"config.data.builder_kwargs holds {', '.join(options.builder_kwargs)}, which data.source={_NAME} does "
                "not have. It has none. To remove them, give --config.data.builder_kwargs='{}'."
            )
        with first_host_first(f"the data set {_NAME}"):
            folder = _prepare(options)
        facts = index.read_facts(folder)
        self.description = f"{_NAME} ({split})"
        self._root, self._shards, self._folder = facts.root, facts.shards, folder
        parts = _parts(split, facts.splits)
        self._parts = [(index.Columns(folder / name), part) for name, part in parts]
        self._ends = list(itertools.accumulate(len(part) for _, part in self._parts))
        self.identity = f"{folder} {split} {facts.splits}"
        self.image_identity = f"{folder.parent.name} {split} {facts.splits}"
        names = dict.fromkeys(name for name, _ in parts)
        self.left_out = sum_left_out(facts.left_out, names)
        other_files = collections.Counter()
        for name in names:
            other_files.update(facts.other_files.get(name, {}))
        self.other_files = dict(sorted(other_files.items()))
        self.captions_missing = _captions_missing(facts)

    def __len__(self) -> int:
        return self._ends[-1]

    def record(self, index: int) -> Record:
        """See `Source.record`."""
        record, file, place = self._row(index)
        try:
            return dataclasses.replace(record, image=_read(file, place))
        except OSError as error:
            raise UnreadableExample("unreadable record", record.name, f"{type(error).__name__}: {error}") from error

    def without_image(self, index: int) -> Record:
        """See `Source.without_image`."""
        return self._row(index)[0]

    def _row(self, number: int) -> tuple[Record, epath.Path, Place]:
        """Returns an example without its image, and where its image is."""
        part = bisect.bisect_right(self._ends, number)
        columns, rows = self._parts[part]
        name = f"{self.description} #{number}"
        try:
            shard, place, key, captions = columns.row(rows[number - self._ends[part]])
            file = epath.Path(self._root) / self._shards[shard % len(self._shards)]
        except (index.DamagedRow, IndexError) as error:
            raise UnreadableExample(
                "unreadable record", name, f"{self._folder}: {error}; delete the folder to index the shards again"
            ) from error
        called = f"{file.name}/{key.decode()}"
        if shard >= len(self._shards):
            file = epath.Path(self._folder / "images" / str(shard - len(self._shards)))
        return Record(b"", captions, f"{name} ({called})", {"file": called}), file, place


def _read(file: epath.Path, place: Place) -> bytes:
    """Reads a part of a local or remote file."""
    if is_remote(file):
        with file.open("rb") as opened:
            opened.seek(place.offset)
            content = opened.read(place.size)
    else:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            content = os.pread(descriptor, place.size, place.offset)
        finally:
            os.close(descriptor)
    if len(content) < place.size:
        raise OSError(f"{file} has no {place.size:,} bytes at {place.offset:,}")
    return content


def _prepare(options: DataOptions) -> pathlib.Path:
    """Returns the folder of the index, after creating it if needed. Its name changes with the shards."""
    found = find_shards(options.path)
    shards = scanning.shards_of(found)
    made_from = fingerprint(found.root, shards, [options.caption_key, options.max_file_bytes])
    # Columns on object storage could not be mapped into memory.
    data_dir = os.path.expanduser(DEFAULT_DATA_DIR) if is_remote(options.prepared_dir) else options.prepared_dir
    folder = pathlib.Path(data_dir) / _NAME / f"shards{len(shards)}_{made_from}" / _VERSION
    if folder.exists():
        once(("reuse", str(folder)), lambda: _log_reuse(folder))
        return folder
    with only_one_prepares(folder, _NAME):
        if not folder.exists():  # another process may have created it in the meantime
            _write(folder, found, options)
    return folder


def _write(folder: pathlib.Path, found: Shards, options: DataOptions) -> None:
    scanning.check_caption_key(found, options.caption_key, options.max_file_bytes, options.path)
    logging.info("Indexing the tar shards of %s in %s. They are read in place from then on.", options.path, folder)
    shards = scanning.shards_of(found)
    unfinished = pathlib.Path(tempfile.mkdtemp(prefix="incomplete.", dir=folder.parent))
    unfinished.chmod(0o755)
    try:
        (unfinished / "images").mkdir()
        copies = [str(unfinished / "images" / str(number)) for number in range(len(shards))]
        limits = options.caption_key, options.max_file_bytes
        scans = scanning.scan_all(found, *limits, copies, options.worker_count())
        reason, names = "folder that cannot be a split", list(found.no_splits)
        splits = ("train", "validation") if "" in found.splits else found.splits
        index.write(
            unfinished,
            scans,
            prepared_from=options.path,
            root=os.fspath(found.root),
            shards=[os.fspath(shard.relative_to(found.root)) for shard in shards],
            left_out={split: {reason: {"count": len(names), "names": names}} for split in splits if names},
        )
        _log_left_out(index.read_facts(unfinished))
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _log_left_out(facts: index.Facts) -> None:
    for split, reasons in facts.left_out.items():
        for reason, each in reasons.items():
            more = ", …" if each["count"] > len(each["names"]) else ""
            logging.warning("%s (%s): left out, %s: %s%s", _NAME, split, reason, ", ".join(each["names"]), more)


def _log_reuse(folder: pathlib.Path) -> None:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / "index.json").stat().st_mtime))
    origin = index.read_facts(folder).prepared_from
    logging.info(
        "%s: using the index prepared on %s in %s from %s; delete %s to make it again.",
        _NAME, when, folder, origin, folder,
    )  # fmt: skip


def _parts(split: str, sizes: dict[str, int]) -> list[tuple[str, range]]:
    """Returns the rows that a split in TFDS's notation means, by the name of the stored split.

    Raises:
      DataError: there is no such split.
    """
    if split == "validation" and split not in sizes:
        split = next((name for name in _VALIDATION if name in sizes), split)
    splits = {name: types.SimpleNamespace(num_examples=count) for name, count in sizes.items()}
    try:
        found = tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)
        parts = [(each.splitname, range(sizes[each.splitname])[each.from_ : each.to]) for each in found]
    except (ValueError, AssertionError, AttributeError, TypeError) as error:
        raise DataError(f"{_NAME} has no split {split!r}; it has {', '.join(sorted(sizes))}.") from error
    if empty := [name for name, part in parts if not part]:
        raise DataError(f"{_NAME}: {split!r} takes no example of the split {empty[0]!r}.")
    return parts


def _captions_missing(facts: index.Facts) -> str | None:
    """Returns why no sample has a caption, or None if one has."""
    if facts.captions:
        return None
    keys = ", ".join(facts.metadata_keys)
    found = (
        f"the .json files have the keys {keys}: give one as --config.data.caption_key=KEY"
        if keys
        else "there is neither a .txt nor a .json with a caption for any image"
    )
    return f"no sample of the shards has a caption; {found}."
