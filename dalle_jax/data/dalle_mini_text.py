"""The text model of DALL-E mini: byte-pair encoding of the ASCII letters of a caption, as in the package min-dalle.

Emoji become their English names. Then the caption is in lower case, and letters outside ASCII are dropped. Blanks split
it into words. Merges begin with "Ġ" (a blank, as byte-level BPE writes it) and the letters of a word, and the merge of
the lowest rank comes first. A caption stands between the ids of begin and end.

A vocabulary is published as `vocab.json` (id by subword) and `merges.txt` (a comment, then one pair of subwords in each
line). A workdir holds both in one JSON file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import emoji
from etils import epath

from dalle_jax.errors import DataError
from dalle_jax.storage import checksummed
from dalle_jax.storage.files import expanded
from dalle_jax.storage.json_files import parse
from dalle_jax.token_layout import LARGEST_VOCABULARY

_KIND = "dalle-mini"
_BLANK = "\u0120"
_BEGIN, _END, _UNKNOWN, _PADDING = "<s>", "</s>", "<unk>", "<pad>"
_PADDING_ID = 1  # DALL-E mini's encoder knows padding by this id


class DalleMiniText:
    """A vocabulary of DALL-E mini. It is a `CaptionModel`.

    Attributes:
      vocab_size: V; ids lie in [0, V). The published models have more ids than subwords.
      begin_id: id before each caption.
      end_id: id after each caption.
    """

    file_name = "dalle_mini_text.json"
    takes_dropout = False

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[str], vocab_size: int, origin: str = "the given vocabulary"
    ):
        """Creates the model.

        Args:
          vocab: id by subword.
          merges: two subwords each, with a blank between them; the first merge has the lowest rank.
          vocab_size: V.
          origin: the file, for messages.

        Raises:
          DataError: an id is none of [0, V), a special subword has no id, or the id of padding is not 1.
        """
        if not (isinstance(vocab_size, int) and 1 <= vocab_size <= LARGEST_VOCABULARY):
            raise DataError(f"{origin} has {vocab_size!r} ids; expected 1 to {LARGEST_VOCABULARY}.")
        for subword, number in vocab.items():
            if type(number) is not int or not 0 <= number < vocab_size:
                raise DataError(
                    f"{origin} gives {subword[:50]!r} the id {number!r}; expected 0 to {vocab_size - 1}. Give "
                    "the vocabulary that was published with the weights."
                )
        missing = [name for name in (_BEGIN, _END, _UNKNOWN, _PADDING) if name not in vocab]
        if missing or vocab[_PADDING] != _PADDING_ID:
            found = f"lacks {', '.join(missing)}" if missing else f"gives {_PADDING} the id {vocab[_PADDING]}"
            raise DataError(
                f"{origin} {found}; expected the vocabulary of DALL-E mini, in which {_PADDING} has the id "
                f"{_PADDING_ID}."
            )
        if wrong := [merge for merge in merges if not isinstance(merge, str)]:
            raise DataError(f"{origin} has the merge {wrong[0]!r}; expected two subwords.")
        self.vocab_size = vocab_size
        self._vocab, self._merges = dict(vocab), tuple(merges)
        self._ranks = {tuple(merge.split()): rank for rank, merge in enumerate(self._merges)}
        self._subwords = {number: subword for subword, number in self._vocab.items()}
        self.begin_id, self.end_id, self._unknown = (self._vocab[name] for name in (_BEGIN, _END, _UNKNOWN))

    @classmethod
    def of_files(
        cls, vocab: str | os.PathLike, merges: str | os.PathLike, vocab_size: int | None = None
    ) -> DalleMiniText:
        """Reads the published files.

        Args:
          vocab: the file `vocab.json`.
          merges: the file `merges.txt`.
          vocab_size: V; None for the largest id of a subword, plus 1.

        Raises:
          DataError: a file is missing or damaged, or see `__init__`.
        """
        ids = _content(vocab)
        try:
            ids = parse(ids)
        except ValueError as error:
            raise DataError(f"{vocab} cannot be read: {error}. Give the file vocab.json of DALL-E mini.") from error
        try:
            lines = _content(merges).decode().split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{merges} is no text in UTF-8. Give the file merges.txt of DALL-E mini.") from error
        if not lines[0].startswith("#version"):
            raise DataError(f"{merges} begins with {lines[0][:50]!r}; expected '#version', as in merges.txt.")
        if vocab_size is None:
            vocab_size = 1 + max((number for number in ids.values() if type(number) is int), default=0)
        return cls(ids, [line for line in lines[1:] if line], vocab_size, str(vocab))

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> DalleMiniText:
        """Reads the file of a workdir.

        Args:
          content: the file.
          origin: its name, for messages.

        Raises:
          DataError: it is damaged.
        """
        try:
            document = parse(content)
            vocab, merges, size = (document[key] for key in ("vocab", "merges", "vocab_size"))
            if not isinstance(vocab, dict) or not isinstance(merges, list):
                raise ValueError("expected a table `vocab` and a list `merges`")
        except (ValueError, KeyError) as error:
            raise DataError(f"{origin} cannot be read as a text model of DALL-E mini: {error!r}.") from error
        return cls(vocab, merges, size, origin)

    @staticmethod
    def recognises(document: Any) -> bool:
        """Returns whether a JSON document is the file of such a model."""
        return isinstance(document, dict) and document.get("kind") == _KIND

    def __reduce__(self):  # worker processes build the model again
        return DalleMiniText, (self._vocab, self._merges, self.vocab_size)

    def save(self, path: str | epath.PathLike) -> None:
        """Writes the model and its checksum (`NAME.sha256`), local or remote; creates the folder if needed."""
        document = {"kind": _KIND, "vocab_size": self.vocab_size, "vocab": self._vocab, "merges": self._merges}
        checksummed.write(path, json.dumps(document, ensure_ascii=False).encode())

    def encode(
        self, text: str, *, max_length: int, dropout: float = 0.0, seed: int | None = None
    ) -> tuple[list[int], bool]:
        """Encodes a caption as ids, with those of begin and end.

        Args:
          text: the caption, in any case; blanks alone give no ids.
          max_length: the most ids to return. The original cuts off the end, too.
          dropout, seed: without meaning here.

        Returns:
          At most `max_length` ids, and whether more were cut off.

        Raises:
          ValueError: a dropout, which this model does not have.
        """
        del seed
        if dropout:
            raise ValueError(f"The text model of DALL-E mini has no BPE dropout; {dropout} was given.")
        if not text.strip():
            return [], False
        subwords = [self._vocab.get(subword, self._unknown) for word in _words(text) for subword in self._split(word)]
        ids = [self.begin_id, *subwords, self.end_id]
        return ids[:max_length], len(ids) > max_length

    def _split(self, word: str) -> list[str]:
        """Merges the letters of a word, the merge of the lowest rank first, and of equal ones the leftmost."""
        parts = [_BLANK, *word]
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, math.inf) for pair in zip(parts, parts[1:])]
            lowest = min(ranks)
            if lowest == math.inf:
                break
            place = ranks.index(lowest)
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return parts

    def unknown_letters(self, text: str) -> str:
        """Returns the different letters of a caption that are dropped or have no id, in their order."""
        named = _named(text)
        unknown = {part for word in _words(text) for part in self._split(word) if part not in self._vocab}
        letters = "".join(unknown).replace(_BLANK, "")
        return "".join(dict.fromkeys(x for x in named if not x.isascii() or x in letters))

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids in [0, V) as text; an unknown subword appears as " ⁇ "."""
        shown = dict.fromkeys((self.begin_id, self.end_id, _PADDING_ID), "") | {self._unknown: " \u2047 "}
        text = "".join(shown.get(int(i), self._subwords.get(int(i), "")) for i in ids)
        return " ".join(text.replace(_BLANK, " ").split())


def _named(text: str) -> str:
    """Returns a caption in lower case with names in place of emoji."""
    return emoji.demojize(text, delimiters=("", "")).lower()


def _words(text: str) -> list[str]:
    """Splits a caption at blanks, without the letters outside ASCII."""
    return [word for word in _named(text).encode("ascii", "ignore").decode().split(" ") if word]


def _content(path: str | os.PathLike) -> bytes:
    """Returns the content of a file; raises a `DataError`."""
    try:
        return expanded(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}. Give the files vocab.json and merges.txt.") from error
