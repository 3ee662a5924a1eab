"""The text model of ru-DALL-E: byte-pair encoding in the text format of YouTokenToMe, read without that package.

    number of letters, number of merges
    code point, id                        of each letter; "▁" (9601) begins a word
    id, id, merged id                     of each merge, the first one first
    ids of unknown letters, padding, begin, end

A caption is in lower case and stands between the ids of begin and end. Letters next to each other that the vocabulary
lacks are one unknown letter.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from etils import epath

from dalle_jax.errors import DataError
from dalle_jax.storage import checksummed
from dalle_jax.token_layout import LARGEST_VOCABULARY

_SPACE = "\u2581"
_BLANKS = re.compile(f"[ \t\n\v\f\r{_SPACE}]+")  # between words
_FIRST_LINE = re.compile(rb"[0-9]{1,8} [0-9]{1,8}\r?\n")
_ALONE = -1  # a run of unknown letters


class YouTokenToMe:
    """A vocabulary of YouTokenToMe. It is a `CaptionModel`.

    Attributes:
      vocab_size: V; ids lie in [0, V).
    """

    file_name = "youtokentome.model"
    takes_dropout = True

    def __init__(self, content: bytes, origin: str = "the given bytes"):
        """Reads a vocabulary.

        Args:
          content: the file.
          origin: its name, for messages.

        Raises:
          DataError: it is none, or it is damaged.
        """
        self._content = content
        try:
            numbers = iter([int(number) for number in content.split()])
            self._read(numbers)
            if next(numbers, None) is not None:
                raise ValueError("it has more numbers than its first line says")
        except (ValueError, StopIteration, KeyError, RuntimeError) as error:
            raise DataError(
                f"{origin} cannot be read as a vocabulary of YouTokenToMe: {str(error) or 'it ends too early'}. Give "
                "the file bpe.model of ru-DALL-E."
            ) from error

    def _read(self, numbers: Iterator[int]) -> None:
        letters, merges = next(numbers), next(numbers)
        if letters + merges > LARGEST_VOCABULARY:
            raise ValueError(f"it has {letters} letters and {merges} merges")
        self._letters: dict[str, int] = {}
        pieces: dict[int, str] = {}
        for _ in range(letters):
            letter, number = chr(next(numbers)), next(numbers)
            self._letters[letter] = number
            pieces[number] = letter
        self._merges: dict[tuple[int, int], tuple[int, int]] = {}  # two ids → place in the order, merged id
        for place in range(merges):
            left, right, merged = (next(numbers) for _ in range(3))
            self._merges[left, right] = place, merged
            pieces[merged] = pieces[left] + pieces[right]
        special = [next(numbers) for _ in range(4)]
        self._unknown, _, self._begin, self._end = special
        self.vocab_size = letters + merges + sum(number >= 0 for number in special)
        taken = {*pieces, *(number for number in special if number >= 0)}
        if taken != set(range(self.vocab_size)):
            raise ValueError(f"its ids are not the numbers from 0 to {self.vocab_size - 1}")
        if min(self._unknown, self._begin, self._end) < 0 or _SPACE not in self._letters:
            raise ValueError("it has no id for unknown letters, begin, end, or '▁'")
        self._pieces = pieces

    @staticmethod
    def recognises(content: bytes) -> bool:
        """Returns whether a file begins like a vocabulary of YouTokenToMe."""
        return _FIRST_LINE.match(content) is not None

    def __reduce__(self):  # worker processes receive the file
        return YouTokenToMe, (self._content,)

    def save(self, path: str | epath.PathLike) -> None:
        """Writes the model and its checksum (`NAME.sha256`), local or remote; creates the folder if needed."""
        checksummed.write(path, self._content)

    def encode(
        self, text: str, *, max_length: int, dropout: float = 0.0, seed: int | None = None
    ) -> tuple[list[int], bool]:
        """Encodes a caption as ids, with those of begin and end.

        Args:
          text: the caption, in any case; blanks alone give no ids.
          max_length: the most ids to return. The original cuts off the end, too.
          dropout: the probability that a possible merge is dropped each time it is considered, in [0, 1).
          seed: seed of the dropout; the same seed gives the same ids.

        Returns:
          At most `max_length` ids, and whether more were cut off.

        Raises:
          ValueError: if dropout has no seed, or does not lie in [0, 1).
        """
        if not 0.0 <= dropout < 1.0 or (dropout and seed is None):
            raise ValueError(f"BPE dropout {dropout}, seed {seed}: it must lie in [0, 1) and needs a seed.")
        draw = random.Random(seed).random
        words = [word for word in _BLANKS.split(text.lower().strip()) if word]
        if not words:
            return [], False
        ids = [self._begin, *(number for word in words for number in self._word(word, dropout, draw)), self._end]
        return ids[:max_length], len(ids) > max_length

    def _word(self, word: str, dropout: float, draw) -> list[int]:
        """Merges the letters of a word, the earliest merge and of equals the leftmost first."""
        parts = [self._letters[_SPACE]]
        for letter in word:
            number = self._letters.get(letter, _ALONE)
            if number != _ALONE or parts[-1] != _ALONE:
                parts.append(number)
        while True:
            pairs = ((self._merges.get(pair), i) for i, pair in enumerate(zip(parts, parts[1:])))
            possible = sorted((*found, i) for found, i in pairs if found is not None)
            chosen = next((each for each in possible if not dropout or draw() >= dropout), None)
            if chosen is None:
                return [self._unknown if part == _ALONE else part for part in parts]
            _, merged, i = chosen
            parts[i : i + 2] = [merged]

    def unknown_letters(self, text: str) -> str:
        """Returns the different letters of a caption that the vocabulary lacks, in their order."""
        letters = _BLANKS.sub("", text.lower())
        return "".join(dict.fromkeys(letter for letter in letters if letter not in self._letters))

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids in [0, V) as text; an unknown letter appears as " ⁇ "."""
        unknown = {self._unknown: " \u2047 "}
        text = "".join(self._pieces.get(int(i), unknown.get(int(i), "")) for i in ids)
        return " ".join(text.replace(_SPACE, " ").split())
