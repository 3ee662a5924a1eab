"""The text model of class-conditional priors: a caption is the number or the name of a class, and becomes one id.

A file of names is text in UTF-8 with one class in each line, class 0 first. Commas separate several names of a class,
such as the name of its folder and its names for people: `n01440764, tench, Tinca tinca`.

V classes
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from dalle_jax.configuration.options import closest
from dalle_jax.data.sources.folder.captions import words
from dalle_jax.data.text import normalize
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.storage import checksummed
from dalle_jax.storage.files import expanded
from dalle_jax.storage.json_files import parse
from dalle_jax.token_layout import LARGEST_VOCABULARY

_KIND = "labels"
_NUMBER = re.compile(r"(?:class|label)? ?[:=]? ?(\d{1,9})")


class Labels:
    """Numbered classes, with names or without. It is a `CaptionModel`.

    Attributes:
      vocab_size: V; ids lie in [0, V).
    """

    file_name = "labels.json"
    takes_dropout = False

    def __init__(self, count: int, names: Sequence[str] = ()):
        """Creates the model.

        Args:
          count: V.
          names: the names of each class, class 0 first, or () if they are unknown. Commas separate several names of a
            class.

        Raises:
          DataError: another number of names, or an empty one.
        """
        if not 1 <= count <= LARGEST_VOCABULARY:
            raise DataError(f"There are {count} classes; expected 1 to {LARGEST_VOCABULARY}.")
        if names and len(names) != count:
            raise DataError(f"There are names of {len(names)} classes; expected {count}, one class in each line.")
        self.vocab_size, self._names = count, tuple(map(str, names))
        self._ids: dict[str, int] = {}
        whole, parts = [], []
        for number, name in enumerate(self._names):
            each = [normalize(part) for part in (name, *name.split(","))]
            if not all(each):
                raise DataError(f"The name of class {number} is {name!r}; expected one or several names with commas.")
            whole.append((each[0], number))
            parts += [(part, number) for part in each[1:]]
        for name, number in whole + parts:  # of two classes with one name, the first is meant
            self._ids.setdefault(name, number)
        # Without "_" and numbers, as people write the name of a folder. Of several classes none is meant.
        self._by_words: dict[str, int | None] = {}
        for name, number in self._ids.items():
            if key := words(name):
                self._by_words[key] = number if self._by_words.get(key, number) == number else None

    @classmethod
    def of_captions(cls, captions: Iterable[str], most: int) -> Labels:
        """Returns the classes that captions name: each different caption is one, in alphabetical order.

        Args:
          captions: the name of the class of each example.
          most: largest number of classes.

        Raises:
          ConfigError: there are more classes.
          DataError: there is no caption.
        """
        names = sorted({normalize(caption) for caption in captions} - {""})
        if not names:
            raise DataError("There is no caption that names a class: every caption given was empty.")
        if len(names) > most:
            raise ConfigError(
                f"There are {len(names):,} different captions, such as {names[0]!r}, and config.text.vocab_size allows "
                f"{most:,} classes. If each of them names a class, give --config.text.vocab_size={len(names)}. "
                "Otherwise train on captions: --config.data.condition=text."
            )
        return cls(len(names), names)

    @classmethod
    def load(cls, path: str | epath.PathLike, count: int | None = None, key: str = "config.text.path") -> Labels:
        """Reads a file of names, or one that `save` wrote.

        Args:
          path: the file, local or remote.
          count: number of classes; None for that of the file.
          key: the key or flag that gave the path, for messages.

        Raises:
          DataError: the file cannot be read, or has another number of classes.
        """
        try:
            content = checksummed.read(expanded(path))
            if content.lstrip()[:1] == b"{":
                return cls.from_bytes(content, str(path))
            lines = content.decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{key}={path} cannot be read: {error}. Give a text file with one class a line.") from error
        while lines and not lines[-1].strip():
            lines.pop()
        try:
            return cls(count or max(len(lines), 1), lines or [""])
        except DataError as error:
            raise DataError(f"{key}={path}: {error}") from error

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> Labels:
        """Reads the content of a file that `save` wrote; `origin` names it in messages.

        Raises:
          DataError: it is damaged.
        """
        try:
            stored = parse(content)
            count, names = stored["count"], stored["names"]
            if type(count) is not int or not isinstance(names, list) or not all(isinstance(x, str) for x in names):
                raise ValueError("count or names are of another kind")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"The labels in {origin} cannot be read: {error}. Import the model again.") from error
        return cls(count, names)

    @staticmethod
    def recognises(document: Any) -> bool:
        """Returns whether a JSON document is one that `save` wrote."""
        return isinstance(document, dict) and document.get("kind") == _KIND

    @property
    def names(self) -> tuple[str, ...]:
        """The names of each class, class 0 first, or () if they are unknown."""
        return self._names

    def __reduce__(self):  # worker processes receive the names
        return Labels, (self.vocab_size, self._names)

    def save(self, path: str | epath.PathLike) -> None:
        """Writes the model and its checksum (`NAME.sha256`), local or remote; creates the folder if needed."""
        stored = {"kind": _KIND, "count": self.vocab_size, "names": list(self._names)}
        checksummed.write(path, json.dumps(stored, ensure_ascii=False, indent=1).encode())

    def encode(
        self, text: str, *, max_length: int, dropout: float = 0.0, seed: int | None = None
    ) -> tuple[list[int], bool]:
        """Encodes "class: 207", "207" or a name as one id.

        Args:
          text: the caption, in any case; blanks alone give no ids.
          max_length: the most ids to return, at least 1.
          dropout: must be 0, because an id cannot be cut into parts.
          seed: unused.

        Returns:
          The id, and False.

        Raises:
          DataError: there is no such class.
          ValueError: a dropout.
        """
        del seed
        if dropout:
            raise ValueError(f"Labels have no BPE dropout; {dropout} was given.")
        text = normalize(text)
        if not text:
            return [], False
        if (number := self._ids.get(text)) is not None:
            return [number][:max_length], False
        found = _NUMBER.fullmatch(text)
        if found and int(found[1]) < self.vocab_size:
            return [int(found[1])][:max_length], False
        if (number := self._by_words.get(words(text))) is not None:
            return [number][:max_length], False
        names = f" or the name of one{closest(text, self._ids)}" if self._ids else ""
        raise DataError(
            f"{text!r} is no class of this model, which draws classes instead of captions. Give a class from "
            f"'class: 0' to 'class: {self.vocab_size - 1}'{names}."
        )

    def unknown_letters(self, text: str) -> str:
        """Returns the letters of a caption that names no class, and "" if it names one."""
        try:
            self.encode(text, max_length=1)
        except DataError:
            return "".join(dict.fromkeys(normalize(text)))
        return ""

    def pieces(self) -> list[str]:
        """Returns the name of each class, so that a training may start from a prior of some of the same classes."""
        return [self.decode([i]) for i in range(self.vocab_size)]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the names of ids in [0, V), or "class: ID" without names."""
        return " ".join(self._names[int(i)] if self._names else f"class: {int(i)}" for i in ids)
