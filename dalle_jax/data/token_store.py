"""Image tokens of a whole split as a column of the data: a folder of parts, read one row at a time.

    <folder>/tokens.json, tokens.json.sha256    what the tokens were encoded from, and their shape
    <folder>/part-00000.npy                     the tokens of the first 4,096 examples, [4096, N]
    <folder>/part-00001.npy                     those of the next, …

Tokens are uint16 if the vocabulary fits, else int32. `numpy.load` reads a part. After its array a part holds a CRC-32
of each row, and a line of JSON with the examples that have no image and with the SHA-256 of the part. A part on a disk
is mapped into memory, so that a row costs no more than its own bytes. A part on object storage is read whole, and the
latest 128 are kept.

A part is written at once or not at all. A folder can therefore be filled by several processes, and after a kill only
the missing parts remain to be done.

    n examples    N tokens of an image
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import threading
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dalle_jax.data.sources.record import UnreadableExample
from dalle_jax.errors import DamagedError, DataError
from dalle_jax.storage import checksummed, json_files
from dalle_jax.storage.files import access, expanded, is_other_than_file, is_remote, write_atomically, write_errors

PART = 4096  # examples in a new part
_OPEN = 1024  # mapped parts
_OPEN_REMOTE = 128  # parts of a remote folder in memory: 1 GiB at 1,024 tokens
_NAME = "tokens.json"
_LOCK = threading.Lock()  # of the open parts: two threads may create batches
_WORDS = {
    "images": "other images, or images that were changed or moved since",
    "image_size": "images of another size",
    "image_key": "another feature of the examples",
    "fit": "images that became square in another way",
    "tokenizer": "another image tokenizer",
    "parameters": "an image tokenizer with other parameters",
    "examples": "another number of examples",
    "tokens": "another number of tokens for each image",
    "vocab_size": "another number of codes",
    "part": "parts of another size",
    "version": "another version of this package",
}

# The reason, name and detail of each example that has no image; see `UnreadableExample`.
Unreadable = Mapping[int, tuple[str, str, str]]


@dataclasses.dataclass(frozen=True)
class Description:
    """A description of the images and the tokenizer that tokens come from, and of their shape.

    Attributes:
      images: hash of `Source.image_identity`; None if changes of the images cannot be seen.
      image_size: height and width of the encoded images, in pixels.
      image_key: feature that holds the image.
      fit: how images became square (`DataOptions.fit`).
      tokenizer: hash of the image tokenizer's options.
      parameters: hash of its parameters.
      examples: n.
      tokens: N.
      vocab_size: tokens are in [0, vocab_size).
      part: number of examples in a part.
      version: of the format.
    """

    images: str | None
    image_size: int
    image_key: str
    fit: str
    tokenizer: str
    parameters: str
    examples: int
    tokens: int
    vocab_size: int
    part: int
    version: int = 1

    @property
    def key(self) -> str:
        """A hash of all attributes, 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()[:16]

    @property
    def dtype(self) -> np.dtype:
        """uint16 if the vocabulary fits, else int32; little-endian."""
        return token_dtype(self.vocab_size)


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the dtype of stored tokens in [0, vocab_size): uint16 if they fit, else int32."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<i4")


class TokensInMemory:
    """Tokens of a source whose examples may change, so that they cannot be stored."""

    def __init__(self, tokens: np.ndarray, unreadable: Unreadable):
        """Keeps the tokens, [n, N], and the examples that have none."""
        self._tokens, self._unreadable = tokens, dict(unreadable)
        self.shape, self.dtype = tokens.shape, tokens.dtype

    def __len__(self) -> int:
        return len(self._tokens)

    def row(self, index: int) -> np.ndarray:
        """See `TokenStore.row`."""
        if index in self._unreadable:
            raise UnreadableExample(*self._unreadable[index])
        return self._tokens[index]


@dataclasses.dataclass(frozen=True)
class _Part:
    """An open part: its rows [m, N], their CRC-32s [m], and the examples without an image."""

    rows: np.ndarray
    sums: np.ndarray
    unreadable: Unreadable


class TokenStore:
    """A folder of encoded tokens. It is picklable, so that each worker process can hold a copy.

    Attributes:
      folder: the folder.
      description: what the tokens were encoded from.
      shape: (n, N).
      dtype: of the tokens.
    """

    def __init__(self, folder: epath.PathLike, description: Description):
        """Reads and writes nothing yet."""
        self.folder, self.description = expanded(folder), description
        self.shape, self.dtype = (description.examples, description.tokens), description.dtype
        self._parts: dict[int, _Part] = {}
        self._most = _OPEN_REMOTE if is_remote(folder) else _OPEN

    def __getstate__(self) -> dict[str, Any]:  # open parts are not pickled
        return {**self.__dict__, "_parts": {}}

    def __len__(self) -> int:
        return self.description.examples

    @property
    def part_count(self) -> int:
        """The number of parts."""
        return -(-len(self) // self.description.part)

    def examples_of(self, part: int) -> range:
        """Returns the examples of a part."""
        size = self.description.part
        return range(part * size, min((part + 1) * size, len(self)))

    def row(self, index: int) -> np.ndarray:
        """Returns the tokens of one example, [N].

        Args:
          index: in [0, n).

        Raises:
          UnreadableExample: the example had no readable image when it was encoded.
          DamagedError: the part is missing or damaged, or belongs to other images.
        """
        number, place = divmod(index, self.description.part)
        part = self._open(number)
        row = part.rows[place]
        if part.sums[place] != self._sum(index, row, readable=index not in part.unreadable):
            raise self._damaged(number, f"row {place} changed since it was written")
        if index in part.unreadable:
            raise UnreadableExample(*part.unreadable[index])
        return np.array(row)

    def write(self, part: int, tokens: np.ndarray, unreadable: Unreadable) -> None:
        """Writes a part.

        Args:
          part: its number.
          tokens: of `examples_of(part)`, integers [m, N].
          unreadable: the examples without an image, by index in the split. Their rows are zero.

        Raises:
          UserError: it cannot be written.
        """
        examples = self.examples_of(part)
        rows = np.ascontiguousarray(tokens, self.dtype)
        sums = [self._sum(i, row, readable=i not in unreadable) for i, row in zip(examples, rows, strict=True)]
        content = self._header(part) + rows.tobytes() + np.array(sums, "<u4").tobytes()
        left_out = {str(i): list(unreadable[i]) for i in examples if i in unreadable}
        last = {"key": self.description.key, "part": part, "unreadable": left_out}
        last["sha256"] = checksummed.checksum(content + json.dumps(last).encode())
        with write_errors(self._path(part)):
            write_atomically(self._path(part), content + f"\n{json.dumps(last)}\n".encode())
        self._parts.pop(part, None)

    def write_description(self) -> None:
        """Writes tokens.json, and creates the folder if needed."""
        checksummed.write_json(self.folder / _NAME, dataclasses.asdict(self.description))

    def fault(self, part: int, *, whole: bool) -> str | None:
        """Returns what is wrong with a part, in a few words; None if it can be used.

        Args:
          part: its number.
          whole: compare all bytes with the SHA-256 and all tokens with the vocabulary. Otherwise its size and its last
            line are checked; `row` then checks each row.
        """
        path = self._path(part)
        if not path.exists():
            return "missing"
        try:
            opened = self._read(part, whole=whole)
        except (OSError, ValueError) as error:
            return f"damaged: {error}"
        if whole and not ((opened.rows >= 0) & (opened.rows < self.description.vocab_size)).all():
            return f"damaged: it holds tokens outside of [0, {self.description.vocab_size})"
        return None

    def faults(self, parts: Collection[int] | None = None, *, whole: bool = True) -> dict[int, str]:
        """Returns the faults of parts, by number; see `fault`. By default of all parts.

        On object storage only parts that are missing are found if `whole` is false, because nothing is read there.
        """
        parts = range(self.part_count) if parts is None else parts
        if is_remote(self.folder) and not whole:
            there = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
            return {part: "missing" for part in parts if self._path(part).name not in there}
        found = {part: self.fault(part, whole=whole) for part in parts}
        return {part: fault for part, fault in found.items() if fault}

    def _path(self, part: int) -> epath.Path:
        return self.folder / f"part-{part:05}.npy"

    def _header(self, part: int) -> bytes:
        header, shape = io.BytesIO(), (len(self.examples_of(part)), self.description.tokens)
        form = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, form)
        return header.getvalue()

    def _sum(self, index: int, row: np.ndarray, *, readable: bool) -> int:
        """Returns the CRC-32 of a row, which also covers its place and whether it has an image."""
        begun = zlib.crc32(f"{self.description.key} {index} {readable}".encode())
        return zlib.crc32(row.tobytes(), begun)

    def _open(self, part: int) -> _Part:
        found = self._parts.get(part)
        if found is None:
            try:
                found = self._read(part, whole=False)
            except (OSError, ValueError) as error:
                raise self._damaged(part, str(error)) from error
            with _LOCK:
                if len(self._parts) >= self._most:
                    del self._parts[next(iter(self._parts))]
                self._parts[part] = found
        return found

    def _read(self, part: int, *, whole: bool) -> _Part:
        """Maps or reads a part. Raises OSError or ValueError if it is not the part that was written."""
        path, header = self._path(part), self._header(part)
        if is_other_than_file(path):
            raise ValueError("it is no file")
        if is_remote(path):
            content = np.frombuffer(path.read_bytes(), np.uint8)
        else:
            size = os.path.getsize(path)
            content = np.memmap(path, np.uint8, mode="r") if size else np.zeros(0, np.uint8)
        rows = len(self.examples_of(part))
        of_rows, of_sums = rows * self.description.tokens * self.dtype.itemsize, rows * 4
        end = len(header) + of_rows + of_sums
        if content[: len(header)].tobytes() != header:
            raise ValueError(f"it is no array of {self.dtype} [{rows}, {self.description.tokens}]")
        if len(content) <= end:
            raise ValueError("its end is missing")
        last = json_files.parse(content[end:].tobytes())
        digest, unreadable = last.pop("sha256", None), last.get("unreadable")
        if last.get("key") != self.description.key or last.get("part") != part:
            raise ValueError("it is a part of other tokens")
        try:
            unreadable = {int(i): (str(a), str(b), str(c)) for i, (a, b, c) in unreadable.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError("its list of unreadable images is damaged") from error
        if whole:
            expected = f"\n{json.dumps({**last, 'sha256': digest})}\n".encode()
            found = checksummed.checksum(content[:end].tobytes() + json.dumps(last).encode())
            if found != digest or content[end:].tobytes() != expected:
                raise ValueError("it changed since it was written")
        array = content[len(header) : len(header) + of_rows].view(self.dtype).reshape(rows, -1)
        return _Part(array, content[end - of_sums : end].view("<u4"), unreadable)

    def _damaged(self, part: int, found: str) -> DamagedError:
        return DamagedError(
            f"The image tokens {self._path(part)} cannot be used: {found}. Encode it again: the same command that "
            "encoded these tokens writes the parts that are missing or damaged."
        )


def exists(folder: epath.PathLike) -> bool:
    """Returns whether a folder holds the description of tokens.

    Raises:
      ConfigError: its storage cannot be reached.
    """
    with access(folder):
        return (expanded(folder) / _NAME).exists()


def read_description(folder: epath.PathLike) -> Description:
    """Reads tokens.json.

    Raises:
      DamagedError: it changed since it was written.
      DataError: it is missing, or not the description of tokens.
    """
    path = expanded(folder) / _NAME
    try:
        values = json_files.parse(checksummed.read(path))
        return Description(**values)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} does not describe image tokens: {error}") from error


def differences(found: Description, expected: Description) -> Sequence[str]:
    """Returns what tokens were encoded from other than expected, in words; () if nothing differs."""
    names = [field.name for field in dataclasses.fields(Description)]
    return [_WORDS[name] for name in names if getattr(found, name) != getattr(expected, name)]
