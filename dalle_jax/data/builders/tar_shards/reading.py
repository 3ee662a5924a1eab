"""Reads the samples of an image–caption tar shard in order, one at a time, as far as it is whole.

Members of one sample stand side by side and share their name up to the first dot of its last part (WebDataset's rule):
`000000000.jpg`, `000000000.txt`, `000000000.json`. Other endings are passed over.

tarfile takes a damaged header for the end of the archive, so that everything behind it would go missing without a word;
here it is an error, and so is an archive without its end mark, or with more behind it.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

PICTURES = ("jpg", "jpeg", "png", "webp")
_TEXT, _METADATA = "txt", "json"
_ENDINGS = (*PICTURES, _TEXT, _METADATA)
_CHUNK = 1 << 20

_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


class DamagedShard(Exception):
    """The shard cannot be read to its end; says why, and after how many samples."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
      key: the name that its members share.
      image: the encoded picture; None where there is none.
      captions: those of the `.txt` (one), else those under "caption" in the `.json` (a text or a list of texts), as
        bytes that should be UTF-8; none where there are neither.
    """

    key: str
    image: bytes | None
    captions: tuple[bytes, ...]


class _Header(tarfile.TarInfo):
    """A member's header that tells damage from the end of the archive."""

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


def read_samples(file: BinaryIO, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Sample]:
    """Reads a shard, compressed or not.

    Args:
      file: seekable; read forwards only, but for the first bytes.
      wanted: says by its number, counted from 0, whether a sample is to be read; the others are passed over.

    Yields:
      The samples that are wanted, in order.

    Raises:
      DamagedShard: after the last sample that is whole, where the shard is damaged.
    """
    number, key, parts = -1, None, {}
    try:
        with tarfile.open(fileobj=file, mode="r:*", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # tarfile would keep every header
                member_key, ending = _split_name(member.name)
                if not member.isfile() or ending not in _ENDINGS:
                    continue
                if member_key != key:
                    if key is not None and wanted(number):
                        yield _sample(key, parts)
                    number, key, parts = number + 1, member_key, {}
                if wanted(number):
                    parts[ending] = archive.extractfile(member).read()
            _check_end(archive.fileobj)
    except _DAMAGE as error:
        # The members of a sample are read one by one: with a picture and a caption it is whole enough.
        last = _sample(key, parts) if parts else None
        whole = last is not None and last.image is not None and bool(last.captions)
        if whole:
            yield last
        found = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise DamagedShard(f"{found}; {max(number, 0) + whole} samples before that") from error
    if key is not None and wanted(number):
        yield _sample(key, parts)


def _split_name(name: str) -> tuple[str, str]:
    """The key and the ending, in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _sample(key: str, parts: dict[str, bytes]) -> Sample:
    image = next((parts[ending] for ending in PICTURES if ending in parts), None)
    captions = (parts[_TEXT],) if parts.get(_TEXT, b"").strip() else _captions_of(parts.get(_METADATA, b"null"))
    return Sample(key, image, captions)


def _captions_of(metadata: bytes) -> tuple[bytes, ...]:
    try:
        content = json.loads(metadata)
    except ValueError:  # a sample without a caption, then: the pipeline counts those
        return ()
    captions = content.get("caption") if isinstance(content, dict) else None
    captions = captions if isinstance(captions, list) else [captions]
    # JSON can hold half of a surrogate pair, which is no text: undecodable bytes, so that the pipeline counts it.
    return tuple(caption.encode("utf-8", "surrogatepass") for caption in captions if isinstance(caption, str))


def _check_end(file: BinaryIO) -> None:
    """Nothing but padding may follow the end mark: a stretch of zeros in the middle of a shard looks just like it."""
    while chunk := file.read(_CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("the end mark is not at the end: zeros, or another archive's beginning")
