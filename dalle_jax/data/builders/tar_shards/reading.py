"""Reads the samples of an image–caption tar shard in order, one at a time, up to its first damage.

Members of one sample follow each other. They share their name up to the first dot of its last part (WebDataset's rule):
`000000000.jpg`, `000000000.txt`, `000000000.json`. Other endings are ignored.

tarfile treats a damaged header as the end of the archive, which would silently lose everything after it. Here it is an
error. An archive without its end mark, or with data after it, is an error too.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp")
_TEXT, _METADATA = "txt", "json"
_ENDINGS = (*IMAGE_ENDINGS, _TEXT, _METADATA)
_CHUNK = 1 << 20

_DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


class DamagedShard(Exception):
    """A shard that cannot be read to its end. The message gives the reason and the number of samples before it."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample.

    Attributes:
      key: the name that its members share.
      image: the encoded image, or None.
      captions: the content of the `.txt`, else "caption" of the `.json` (a text or a list of texts); () without either.
        Bytes that should be UTF-8.
    """

    key: str
    image: bytes | None
    captions: tuple[bytes, ...]


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


def read_samples(file: BinaryIO, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Sample]:
    """Reads a shard, compressed or not.

    Args:
      file: a seekable file; only its first bytes are read twice.
      wanted: selects samples by their number, counted from 0; the others are skipped.

    Yields:
      The selected samples, in order.

    Raises:
      DamagedShard: after the last complete sample, if the shard is damaged.
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
        # The members of a sample are read one by one. With an image and a caption it is complete enough.
        last = _sample(key, parts) if parts else None
        whole = last is not None and last.image is not None and bool(last.captions)
        if whole:
            yield last
        found = (str(error).splitlines() or [type(error).__name__])[-1].strip()
        raise DamagedShard(f"{found}; {max(number, 0) + whole} samples before that") from error
    if key is not None and wanted(number):
        yield _sample(key, parts)


def _split_name(name: str) -> tuple[str, str]:
    """Splits a member's name into the sample's key and the ending in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower()


def _sample(key: str, parts: dict[str, bytes]) -> Sample:
    image = next((parts[ending] for ending in IMAGE_ENDINGS if ending in parts), None)
    captions = (parts[_TEXT],) if parts.get(_TEXT, b"").strip() else _captions_of(parts.get(_METADATA, b"null"))
    return Sample(key, image, captions)


def _captions_of(metadata: bytes) -> tuple[bytes, ...]:
    try:
        content = json.loads(metadata)
    except ValueError:  # The pipeline counts samples without a caption.
        return ()
    captions = content.get("caption") if isinstance(content, dict) else None
    captions = captions if isinstance(captions, list) else [captions]
    # JSON can hold half of a surrogate pair, which is no text. Undecodable bytes let the pipeline count it.
    return tuple(caption.encode("utf-8", "surrogatepass") for caption in captions if isinstance(caption, str))


def _check_end(file: BinaryIO) -> None:
    """Raises an error if data follow the end mark, because zeros in the middle of a shard look just like it."""
    while chunk := file.read(_CHUNK):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError("data follow the end mark: zeros in the middle, or a second archive")
