"""Scans tar shards once: which samples there are, in which split, with which captions, and where their images are.

Only headers and texts are read. Processes share the work, shard by shard.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence

from etils import epath

from dalle_jax.data.sources.tar_shards import reading
from dalle_jax.data.sources.tar_shards.listing import Shards
from dalle_jax.data.workers import init_worker, signals_blocked
from dalle_jax.errors import DataError

_VALIDATION_SHARE = 20
_TRIED = 100  # samples that are read before the caption key counts as absent
MAX_KEYS = 50  # of .json files, for messages
_WORTH_PROCESSES = 2**28  # bytes of shards, below which starting processes takes longer than scanning
NAMED = 5  # names kept for each reason


@dataclasses.dataclass(frozen=True)
class Division:
    """The splits of the samples of a shard.

    Attributes:
      folder: the split of all samples, if the shard stands in a split's folder; else "".
      only: the key of the only sample held out, where the hash holds out none of a few; else None.
      both: whether a single sample is in both splits, because it cannot be divided.
    """

    folder: str = ""
    only: str | None = None
    both: bool = False

    def splits(self) -> tuple[str, ...]:
        """Returns all splits."""
        return (self.folder,) if self.folder else ("train", "validation")

    def splits_of(self, key: str) -> tuple[str, ...]:
        """Returns the splits of a sample."""
        if self.folder or self.both:
            return self.splits()
        held_out = _is_held_out(key) if self.only is None else key == self.only
        return ("validation",) if held_out else ("train",)


@dataclasses.dataclass(frozen=True)
class Row:
    """One sample of a scanned shard.

    Attributes:
      key: its name in the shard.
      captions: its captions, bytes that should be UTF-8.
      copied: whether the image is in the file of copied images instead of the shard.
      place: the bytes of the image in that file.
    """

    key: bytes
    captions: tuple[bytes, ...]
    copied: bool
    place: reading.Place


@dataclasses.dataclass
class Found:
    """The samples of one split in one shard.

    Attributes:
      rows: the samples with an image, in order.
      left_out: by reason, how many samples are missing, and the names of the first.
      other_files: number of members passed over, by ending.
    """

    rows: list[Row] = dataclasses.field(default_factory=list)
    left_out: dict[str, tuple[int, list[str]]] = dataclasses.field(default_factory=dict)
    other_files: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def leave_out(self, reason: str, name: str) -> None:
        """Counts a missing sample under a reason, a few words."""
        count, names = self.left_out.get(reason, (0, []))
        self.left_out[reason] = count + 1, [*names, name][:NAMED]


@dataclasses.dataclass
class Scan:
    """The samples of one shard.

    Attributes:
      splits: its samples by split.
      captions: number of captions.
      metadata_keys: the first keys of .json files without a caption.
    """

    splits: dict[str, Found]
    captions: int = 0
    metadata_keys: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass(frozen=True)
class _Work:
    """One shard to scan, and the local file for images that must be copied."""

    shard: str
    division: Division
    caption_key: str
    max_bytes: int
    copies: str


def scan_all(
    found: Shards, caption_key: str, max_bytes: int, copies: Sequence[str], workers: int
) -> Iterator[tuple[int, Scan]]:
    """Scans all shards.

    Args:
      found: the shards.
      caption_key: see `reading.read_samples`.
      max_bytes: the most bytes of a member.
      copies: a local file for each shard, in the order of the splits; written if images must be copied.
      workers: number of processes; with 0 or 1, or little to read, this one scans.

    Yields:
      The number of each shard in the order of the splits, and its samples.
    """
    division = _divide(found.splits[""]) if "" in found.splits else None
    work = [
        _Work(os.fspath(shard), division or Division(folder=split), caption_key, max_bytes, copy)
        for (split, shard), copy in zip(_ordered(found), copies)
    ]
    with contextlib.ExitStack() as stack:
        scans = map(_scan, work)
        if workers > 1 and len(work) > 1 and _bytes(work) > _WORTH_PROCESSES:
            context = multiprocessing.get_context("spawn")
            count = min(workers, len(work))
            pool = concurrent.futures.ProcessPoolExecutor(count, context, initializer=init_worker, initargs=(0, count))
            stack.callback(pool.shutdown, cancel_futures=True)
            with signals_blocked():
                scans = _in_order(pool, work, 2 * count)
                scans = itertools.chain([next(scans)], scans)
        try:
            yield from enumerate(scans)
        except concurrent.futures.BrokenExecutor as error:
            raise DataError(
                "A process that reads tar shards was killed, perhaps for lack of memory. Set --config.data.workers=1."
            ) from error


def _bytes(work: Sequence[_Work]) -> int:
    return sum(epath.Path(each.shard).stat().length for each in work)


def _in_order(pool: concurrent.futures.Executor, work: Sequence[_Work], ahead: int) -> Iterator[Scan]:
    """Yields the results in order. At most `ahead` of them wait in memory."""
    waiting = collections.deque(pool.submit(_scan, each) for each in work[:ahead])
    for each in work[ahead:]:
        yield waiting.popleft().result()
        waiting.append(pool.submit(_scan, each))
    while waiting:
        yield waiting.popleft().result()


def shards_of(found: Shards) -> list[epath.Path]:
    """Returns all shards in the order in which they are numbered: split by split."""
    return [shard for _, shard in _ordered(found)]


def _ordered(found: Shards) -> Iterator[tuple[str, epath.Path]]:
    return ((split, shard) for split, shards in found.splits.items() for shard in shards)


def _scan(work: _Work) -> Scan:
    shard, scan = epath.Path(work.shard), Scan({split: Found() for split in work.division.splits()})
    try:
        with shard.open("rb") as file, contextlib.closing(_Copies(work.copies)) as copies:
            samples = reading.read_samples(file, caption_key=work.caption_key, max_bytes=work.max_bytes, locate=True)
            for sample in samples:
                _add(scan, sample, shard.name, work.division.splits_of(sample.key), copies)
    except (reading.DamagedShard, OSError) as error:
        for found in scan.splits.values():
            found.leave_out("damaged shard", f"{shard.name} ({error})")
    return scan


def _add(scan: Scan, sample: reading.Sample, shard: str, splits: tuple[str, ...], copies: _Copies) -> None:
    """Adds a sample to its splits."""
    key = sample.key.encode("utf-8", "backslashreplace")
    row = None
    if sample.image is not None:
        copied = isinstance(sample.image, bytes)
        row = Row(key, sample.captions, copied, copies.add(sample.image) if copied else sample.image)
        scan.captions += len(sample.captions)
        if not sample.captions and len(scan.metadata_keys) < MAX_KEYS:
            scan.metadata_keys.update(sample.metadata_keys)
    for found in map(scan.splits.__getitem__, splits):
        found.other_files.update(sample.other_endings)
        for member in sample.too_large:
            found.leave_out("file too large", f"{shard}/{member}")
        if row is not None:
            found.rows.append(row)
        elif not sample.too_large and (sample.captions or sample.metadata_keys):
            found.leave_out("missing image", f"{shard}/{key.decode()}")


class _Copies:
    """A local file for images that cannot be read in their shard. It is created for the first one."""

    def __init__(self, path: str):
        self._path, self._file = path, None

    def add(self, content: bytes) -> reading.Place:
        """Appends an image."""
        self._file = self._file or open(self._path, "wb")
        place = reading.Place(self._file.tell(), len(content))
        self._file.write(content)
        return place

    def close(self) -> None:
        if self._file:
            self._file.close()


def check_caption_key(found: Shards, wanted: str, max_bytes: int, path: str) -> None:
    """Looks for a caption key in the first samples, before all of them are scanned.

    Args:
      found: the shards.
      wanted: the caption key; "caption" is no demand.
      max_bytes: the most bytes of a member.
      path: the shards' path, for the message.

    Raises:
      DataError: none of the first samples has it. The message lists the keys there are.
    """
    if wanted == "caption":
        return
    keys = collections.Counter()
    for sample in itertools.islice(_samples(shards_of(found), max_bytes), _TRIED):
        if reading.has_key(sample, wanted):
            return
        keys.update(sample.metadata_keys)
    raise DataError(
        f"data.caption_key is {wanted!r}, but the .json files in {path} have no such key "
        f"({_TRIED} samples tried). They have: {', '.join(sorted(keys)) or 'nothing'}."
    )


def _samples(shards: Iterable[epath.Path], max_bytes: int) -> Iterator[reading.Sample]:
    for shard in shards:
        try:
            with shard.open("rb") as file:
                yield from reading.read_samples(file, max_bytes=max_bytes, locate=True)
        except (reading.DamagedShard, OSError):
            continue  # counted when the shard is scanned


def _is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode("utf-8", "surrogateescape")) < 2**32 // _VALIDATION_SHARE


def _divide(shards: Sequence[epath.Path]) -> Division:
    """Returns the rule of the splits. If the hash holds out none of a few samples, the nearest one is held out."""
    keys = set()
    for shard in shards:
        try:
            with shard.open("rb") as file:
                for key in reading.read_keys(file):
                    if _is_held_out(key):
                        return Division()
                    keys.add(key)
        except OSError:
            continue  # counted when the shard is scanned
    nearest = min(keys, key=lambda key: (zlib.crc32(key.encode("utf-8", "surrogateescape")), key), default="")
    return Division(only=nearest, both=len(keys) < 2)
