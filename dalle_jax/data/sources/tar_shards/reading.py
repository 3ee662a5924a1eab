"""Reads the samples of an image–caption tar shard in order, one at a time, up to its first damage.

Members of one sample follow each other. They share their name up to the first dot of its last part (WebDataset's rule):
`000000000.jpg`, `000000000.txt`, `000000000.json`. If no member of a name has a plain ending, the names themselves hold
dots, and each ends at its last dot: `photo 1.5.jpg`, `photo 1.5.txt`, `photo 1.6.jpg`. Other endings are counted.

An image can be located instead of read, so that only headers and texts are read. The shard must then be uncompressed.

tarfile treats a damaged header as the end of the archive, which would silently lose everything after it. Here it is an
error. An archive without its end mark, or with data after it, is an error too.
"""

from __future__ import annotations

import dataclasses
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from dalle_jax.data.sources.decoding import Limits
from dalle_jax.storage import json_files

IMAGE_ENDINGS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "img")
_TEXTS, _METADATA = ("txt", "caption", "cap"), "json"
_ENDINGS = (*IMAGE_ENDINGS, *_TEXTS, _METADATA)
_CAPTION_KEYS = ("caption", "captions", "text", "title")
_CHUNK = 1 << 20
_MAX_HEADER_BYTES = 1 << 20  # of a long name or an extended header
_EXTENDED = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip
_MAX_UNDECIDED = 16  # samples of one name whose rule is not known yet

_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


class DamagedShard(Exception):
    """A shard that cannot be read to its end. The message gives the reason and the number of samples before it."""


class Place(NamedTuple):
    """The bytes of a member in its shard."""

    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
      key: the name that its members share.
      image: the encoded image, or its place in an uncompressed shard, or None.
      captions: the content of the `.txt`, `.caption` or `.cap`, else of the `.json` (a text or a list of texts); () if
        there is neither. Bytes that should be UTF-8.
      too_large: names of the members that exceed the limit and were not read.
      other_endings: endings of the members that are neither image nor caption, in lower case (".cls").
      metadata_keys: the keys of the `.json`.
    """

    key: str
    image: bytes | Place | None
    captions: tuple[bytes, ...]
    too_large: tuple[str, ...] = ()
    other_endings: tuple[str, ...] = ()
    metadata_keys: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Rules:
    """Arguments of `read_samples`, and the length of the shard in bytes."""

    wanted: Callable[[str], bool]
    caption_key: str
    max_bytes: int
    locate: bool
    length: int


class _Header(tarfile.TarInfo):
    """A member's header that distinguishes damage from the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive):
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.EmptyHeaderError as error:
            raise tarfile.ReadError("the archive ends without its end mark") from error
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error

    def _proc_member(self, archive):
        """Called by tarfile for each header; its documentation names this method for subclasses."""
        if self.type in _EXTENDED and self.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header of {self.size:,} bytes")
        return super()._proc_member(archive)


def read_samples(
    file: BinaryIO,
    wanted: Callable[[str], bool] = lambda key: True,
    caption_key: str = "caption",
    max_bytes: int = Limits.max_file_bytes,
    locate: bool = False,
) -> Iterator[Sample]:
    """Reads a shard, compressed or not.

    Args:
      file: a seekable file; only its first bytes are read twice.
      wanted: selects samples by their key; the others are skipped.
      caption_key: the key of the `.json` that holds the caption ("a/b" for a nested one). "caption" means the text
        file, else the first of the usual keys. Any other key is preferred to the text file.
      max_bytes: the most bytes of a member; larger ones are not read.
      locate: give the places of images instead of their bytes, unless the shard is compressed.

    Yields:
      The selected samples, in order.

    Raises:
      DamagedShard: after the last complete sample, if the shard is damaged.
    """
    count, found = 0, _Undecided("")
    rules = _Rules(wanted, caption_key, max_bytes, locate, file.seek(0, os.SEEK_END) if locate else 0)
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:*", tarinfo=_Header) as archive:
            rules = dataclasses.replace(rules, locate=locate and archive.fileobj is file)
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep every header
                if not member.isfile():
                    continue
                if _split(member.name)[0] != found.name:
                    count += found.count
                    yield from found.samples(rules)
                    found = _Undecided(_split(member.name)[0])
                found.add(archive, member, rules)
                if found.is_large():
                    ready = found.take_ready()
                    count += ready.count
                    yield from ready.samples(rules)
            _check_end(archive.fileobj)
    except _DAMAGE as error:
        # The members of a sample are read one by one. With an image and a caption it is complete enough.
        whole = [sample for sample in found.samples(rules) if sample.image is not None and sample.captions]
        yield from whole
        reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise DamagedShard(f"{reason}; {count + len(whole)} samples before that") from error
    yield from found.samples(rules)


def read_keys(file: BinaryIO) -> Iterator[str]:
    """Yields the keys of a shard's samples in order, up to its first damage. Reads headers only.

    Args:
      file: a seekable file.
    """
    try:
        yield from (sample.key for sample in read_samples(file, max_bytes=-1) if sample.too_large)
    except DamagedShard:
        return


def _split(name: str) -> tuple[str, str]:
    """Splits a member's name at the first dot of its last part: the key, and the ending in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


class _Members:
    """The members of one sample that were read so far."""

    def __init__(self):
        self.parts: dict[str, bytes | Place] = {}
        self.too_large: list[str] = []
        self.others: list[str] = []


class _Undecided:
    """The members whose names agree up to their first dot: one sample, or several whose names hold dots."""

    def __init__(self, name: str):
        self.name = name
        self._plain: _Members | None = None
        self._dotted: dict[str, _Members] = {}

    def add(self, archive: tarfile.TarFile, member: tarfile.TarInfo, rules: _Rules) -> None:
        """Reads a member, unless nothing asks for it."""
        ending = _split(member.name)[1]
        key, last = self.name, ending
        if ending.partition(".")[0] in IMAGE_ENDINGS and ending.rpartition(".")[2] in (*_TEXTS, _METADATA):
            last = ending.rpartition(".")[2]  # x.jpg.txt is the text of x.jpg
        elif "." in ending:
            key, last = member.name[: member.name.rindex(".")], ending.rpartition(".")[2]
        if last not in _ENDINGS:
            key, last = self.name, ""
        if key == self.name:
            self._plain = self._plain or (_Members() if last else None)
            members = self._plain or self._dotted.setdefault("", _Members())
        else:
            members = self._dotted.setdefault(key, _Members())
        if not last or (key != self.name and self._plain is not None):
            members.others.append(f".{ending}" if ending else "")
        elif rules.wanted(key):
            if member.size > rules.max_bytes:
                members.parts.setdefault(last, b"")
                members.too_large.append(member.name)
            else:
                members.parts[last] = _content(archive, member, rules, last)
        else:
            members.parts[last] = b""

    @property
    def count(self) -> int:
        """Number of samples, wanted or not."""
        return 1 if self._plain else len([key for key in self._dotted if key])

    def is_large(self) -> bool:
        """Returns whether this many samples are held that their names are taken to hold dots."""
        return self._plain is None and len(self._dotted) > _MAX_UNDECIDED

    def take_ready(self) -> _Undecided:
        """Splits off all samples but the last one, whose members may not all be there yet."""
        ready = _Undecided(self.name)
        last = next(reversed(self._dotted))
        ready._dotted, self._dotted = self._dotted, {last: self._dotted.pop(last)}
        return ready

    def samples(self, rules: _Rules) -> Iterator[Sample]:
        """Yields the wanted samples."""
        if self._plain is not None:
            # Other images next to a plain one are its masks and the like: WebDataset's `x.seg.png` next to `x.jpg`.
            for key, members in self._dotted.items():
                self._plain.others += members.others + [key[len(self.name) :] + f".{last}" for last in members.parts]
            if rules.wanted(self.name):
                yield _sample(self.name, self._plain, rules)
            return
        others = self._dotted.pop("", _Members()).others
        for key, members in self._dotted.items():
            members.others, others = members.others + others, []
            if rules.wanted(key):
                yield _sample(key, members, rules)
        if others and rules.wanted(self.name):
            yield Sample(self.name, None, (), other_endings=tuple(others))


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, rules: _Rules, ending: str) -> bytes | Place:
    """Reads a member, or locates it. A sparse member is always read, because its bytes do not follow each other."""
    if not rules.locate or ending not in IMAGE_ENDINGS or member.issparse():
        return archive.extractfile(member).read()
    if member.offset_data + member.size > rules.length:
        raise tarfile.ReadError("unexpected end of data")
    return Place(member.offset_data, member.size)


def _sample(key: str, members: _Members, rules: _Rules) -> Sample:
    parts, large = members.parts, {name.rpartition(".")[2].lower() for name in members.too_large}
    image = next((parts[each] for each in IMAGE_ENDINGS if each in parts and each not in large), None)
    text = next((parts[each] for each in _TEXTS if parts.get(each, b"").strip()), None)
    facts = _read_json(parts.get(_METADATA, b"null"))
    captions = () if text is None else (text,)
    if rules.caption_key != "caption":
        captions = _captions_of(facts, rules.caption_key) or captions
    else:
        captions = captions or next((c for each in _CAPTION_KEYS if (c := _captions_of(facts, each))), ())
    return Sample(key, image, captions, tuple(members.too_large), tuple(members.others), tuple(facts))


def _read_json(content: bytes) -> Mapping[str, Any]:
    try:
        return json_files.parse(content)
    except json_files.WrongJson:  # The pipeline counts samples without a caption.
        return {}


def _captions_of(facts: Mapping[str, Any], key: str) -> tuple[bytes, ...]:
    found: Any = facts
    for part in key.split("/"):
        found = found.get(part) if isinstance(found, dict) else None
    captions = found if isinstance(found, list) else [found]
    # JSON can hold half of a surrogate pair, which is no text. Undecodable bytes let the pipeline count it.
    return tuple(caption.encode("utf-8", "surrogatepass") for caption in captions if isinstance(caption, str))


def _check_end(file: BinaryIO) -> None:
    """Raises an error if data follow the end mark, because zeros in the middle of a shard look just like it."""
    while chunk := file.read(_CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("data follow the end mark: zeros in the middle, or a second archive")


def has_key(sample: Sample, key: str) -> bool:
    """Returns whether the `.json` of a sample has a key; of a nested one ("a/b"), whether it has the first part."""
    return key.split("/")[0] in sample.metadata_keys
