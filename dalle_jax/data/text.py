"""The text model: encodes captions as ids by lower-cased byte-pair encoding with seeded BPE dropout, and decodes them.

Section 2.2 of Zero-Shot Text-to-Image Generation: captions are lower-cased and BPE-encoded. In training, 10% of the
merges are dropped (BPE dropout, Provilkov et al. 2020), so that the prior sees many segmentations of a word.

sentencepiece trains and holds the vocabulary and does the plain encoding. Its dropout draws from one generator per
thread that cannot be seeded per caption, and a resumed run could not repeat an interrupted one. Dropout therefore walks
the merges here, in Python. At dropout 0 both give the same ids (tested).

    T text positions    V text vocabulary
"""

from __future__ import annotations

import functools
import io
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import sentencepiece
from absl import logging
from etils import epath

from dalle_jax.errors import ConfigError, DataError
from dalle_jax.storage import checksummed
from dalle_jax.storage.files import expanded

_SPACE = "\u2581"  # written by sentencepiece for the blank before a word
_UNKNOWN = 0
_NOT_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff" + _SPACE + "]")  # controls, lone surrogates
# Spellings of one sign, of which a vocabulary may hold only some. The first one that it holds is used.
_SAME_SIGN = (
    "'\u2019\u2018\u201b\u02bc\u2032",
    '"\u201c\u201d\u201e\u201f\u2033\xab\xbb',
    "-\u2010\u2013\u2014\u2212\u2012\u2015",
)
_SPELLINGS = {letter: letters for letters in _SAME_SIGN for letter in letters}
# More captions cost memory and do not change the merge statistics, so a fixed sample is used.
_MAX_TRAINING_CAPTIONS = 1_000_000
_MAX_TRAINING_LENGTH = 1000  # characters
_MAX_NAMED = 50  # unknown letters in a warning


class CaptionEncoder(Protocol):
    """The part of a text model that sampling and scoring use; `TextModel` and `BytePairs` have it."""

    def encode(self, text: str, *, max_length: int) -> tuple[list[int], bool]:
        """Encodes a caption as at most `max_length` ids, and returns whether more were cut off."""

    def unknown_letters(self, text: str) -> str:
        """Returns the different letters of a caption that have no id."""


@runtime_checkable
class CaptionModel(Protocol):
    """The text model of a prior: encodes captions as ids in [0, V), and decodes them.

    Attributes:
      vocab_size: V, without padding.
      file_name: name of its file in a workdir.
      takes_dropout: whether `encode` has BPE dropout.
    """

    vocab_size: int
    file_name: str
    takes_dropout: bool

    def encode(
        self, text: str, *, max_length: int, dropout: float = 0.0, seed: int | None = None
    ) -> tuple[list[int], bool]:
        """See `TextModel.encode`."""

    def unknown_letters(self, text: str) -> str:
        """See `TextModel.unknown_letters`."""

    def decode(self, ids: Sequence[int]) -> str:
        """See `TextModel.decode`."""

    def save(self, path: str | epath.PathLike) -> None:
        """Writes the model and its checksum."""


def normalize(text: str) -> str:
    """Returns a caption's normal form: NFKC, lower case, single blanks, no control and no invisible characters.

    Invisible characters are those of Unicode's category Cf (zero-width blanks and joiners, direction marks, the byte
    order mark) and variation selectors. Without joiners an emoji of several parts becomes the sequence of its parts.

    Args:
      text: any string.

    Returns:
      The normal form; empty if `text` holds only blanks and control characters.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    if not text.isascii():
        text = "".join(letter for letter in text if not _is_invisible(letter))
    return " ".join(_NOT_TEXT.sub(" ", text).split())


def _is_invisible(letter: str) -> bool:
    return unicodedata.category(letter) == "Cf" or "\ufe00" <= letter <= "\ufe0f"


def only_unknown(model: CaptionEncoder, caption: str) -> bool:
    """Returns whether a caption has letters, and the text model knows none of its letters and digits."""
    unknown = model.unknown_letters(caption)
    return bool(unknown) and not any(letter.isalnum() and letter not in unknown for letter in normalize(caption))


def encode_captions(model: CaptionEncoder, captions: Sequence[str], max_length: int) -> list[list[int]]:
    """Encodes a user's captions as ids. One warning lists the letters that the vocabulary lacks.

    Args:
      model: a text model.
      captions: at least one caption; none is empty.
      max_length: the most ids per caption; longer captions are truncated, with one warning per caption.

    Returns:
      The ids of each caption, without padding.

    Raises:
      DataError: if there is no caption, an empty one, or one without any letter that the vocabulary knows.
    """
    if not captions:
        raise DataError("No caption was given; expected at least one.")
    rows, unknown = [], {}
    for caption in captions:
        ids, truncated = model.encode(caption, max_length=max_length)
        if not ids:
            raise DataError(f"The caption {caption!r} is empty; describe the image in a few words.")
        if only_unknown(model, caption):
            raise DataError(
                f"The caption {caption!r} has no letter that the text model knows: its vocabulary holds the letters of "
                "the captions that it was trained on. Describe the image with words of these captions."
            )
        unknown.update(dict.fromkeys(model.unknown_letters(caption)))
        if truncated:
            _warn_truncated(str(caption), max_length)
        rows.append(ids)
    if unknown:
        _warn_unknown("".join(unknown))
    return rows


@functools.lru_cache(maxsize=1000)
def _warn_unknown(letters: str) -> None:
    logging.warning(
        "The text vocabulary lacks %s. The model reads each of these letters as unknown.",
        ", ".join(repr(letter) for letter in letters[:_MAX_NAMED]) + (", …" if len(letters) > _MAX_NAMED else ""),
    )


@functools.lru_cache(maxsize=1000)  # a caption of a test set is encoded once per metric
def _warn_truncated(caption: str, max_length: int) -> None:
    logging.warning("Caption truncated to %d tokens: %r", max_length, caption)


class TextModel:
    """A BPE vocabulary, created by `TextModel.train` or `TextModel.load`.

    Attributes:
      vocab_size: V; ids lie in [0, V), and id 0 stands for characters that the vocabulary lacks.
    """

    file_name = "sentencepiece.model"
    takes_dropout = True

    def __init__(self, serialized: bytes, origin: str = "the given bytes"):
        """Wraps a serialized sentencepiece model.

        Args:
          serialized: the content of a `sentencepiece.model` file.
          origin: the file that held it, for the error message.

        Raises:
          DataError: if the bytes are not a BPE model of sentencepiece.
        """
        try:
            if not serialized:  # sentencepiece would accept it and encode nothing
                raise RuntimeError("empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
            self.vocab_size: int = self._processor.vocab_size()
        except RuntimeError as error:
            raise DataError(
                f"The text model in {origin} cannot be read ({len(serialized)} bytes): it is not a model of "
                "sentencepiece, or it is damaged. Give the file that training wrote, or delete it."
            ) from error
        self._serialized = serialized
        # In a BPE model a piece's score is minus its rank among the merges: the highest is merged first.
        self._pieces = {
            self._processor.id_to_piece(i): (-self._processor.get_score(i), i)
            for i in range(self.vocab_size)
            if not self._processor.is_unknown(i) and not self._processor.is_control(i)
        }

        self._letters = frozenset(piece for piece in self._pieces if len(piece) == 1) | {" "}

    def __reduce__(self):  # worker processes receive the model as its bytes
        return TextModel, (self._serialized,)

    @classmethod
    def load(cls, path: str | epath.PathLike) -> TextModel:
        """Reads the model from a file, local or remote.

        Args:
          path: the `sentencepiece.model` file.

        Raises:
          DataError: if there is no such file, or it is not a sentencepiece model.
          DamagedError: if it changed since `save` wrote it.
        """
        try:
            serialized = checksummed.read(expanded(path))
        except OSError as error:
            raise DataError(
                f"No text model at {path}: {error}. Training writes `sentencepiece.model`; give that file."
            ) from error
        return cls(serialized, str(path))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, path: str | epath.PathLike | None = None) -> TextModel:
        """Trains a vocabulary; the same captions in the same order give the same model.

        Args:
          captions: the training captions, in any case.
          vocab_size: the most ids to use. A small corpus has fewer pieces and gets a smaller vocabulary.
          path: the file to write the model to, or None.

        Returns:
          The trained model.

        Raises:
          DataError: if no caption holds any text.
          ConfigError: if `vocab_size` is smaller than the number of different characters.
        """
        sample = _sample(captions)
        if not sample:
            raise DataError(
                "There is no caption to train the text model on: every caption given was empty. "
                "Check the data source and its caption key."
            )
        # Every letter needs an id, so rare letters (large multilingual corpora) leave no room for words in the
        # vocabulary. There the rarest 0.05% of the text becomes <unk>.
        letters = set().union(*sample) - {" "}
        coverage = 1.0 if len(letters) <= vocab_size // 4 or len(letters) < 256 else 0.9995
        written = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sample),
                model_writer=written,
                model_type="bpe",
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                character_coverage=coverage,
                normalization_rule_name="identity",
                unk_id=_UNKNOWN,
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ConfigError(
                f"A text vocabulary of {vocab_size} is too small for these captions, in which {len(letters)} "
                f"different characters occur: set text.vocab_size to at least {len(letters) + 2}. ({error})"
            ) from error
        model = cls(written.getvalue())
        if path is not None:
            model.save(path)
        return model

    def save(self, path: str | epath.PathLike) -> None:
        """Writes the model and its checksum (`NAME.sha256`), local or remote; creates the folder if needed."""
        checksummed.write(path, self._serialized)

    def encode(
        self, text: str, *, max_length: int, dropout: float = 0.0, seed: int | None = None
    ) -> tuple[list[int], bool]:
        """Encodes a caption as ids, without padding.

        Args:
          text: the caption, in any case; blanks alone give no ids.
          max_length: T, the most ids to return.
          dropout: the probability that a possible merge is dropped each time it is considered, in [0, 1).
          seed: seed of the dropout; the same seed gives the same ids.

        Returns:
          At most T ids in [0, V), and whether more were cut off.

        Raises:
          ValueError: if dropout has no seed, or does not lie in [0, 1).
        """
        text = self._as_known(normalize(text))
        if dropout == 0.0:
            ids = self._processor.encode(text)
        elif seed is None or not 0.0 < dropout < 1.0:
            raise ValueError(f"BPE dropout {dropout}, seed {seed}: it must lie in [0, 1) and needs a seed.")
        else:
            draw = random.Random(seed).random
            words = [self._encode_word(_SPACE + word, dropout, draw) for word in text.split()]
            ids = _join_unknown([i for word in words for i in word])
        return ids[:max_length], len(ids) > max_length

    def unknown_letters(self, text: str) -> str:
        """Returns the different letters of a caption that the vocabulary lacks, in their order.

        Quotation marks, apostrophes and dashes are known if the vocabulary holds another spelling of the same sign.

        Args:
          text: the caption, in any case.
        """
        return "".join(dict.fromkeys(x for x in self._as_known(normalize(text)) if x not in self._letters))

    def pieces(self) -> list[str]:
        """Returns the spelling of each id."""
        return [self._processor.id_to_piece(i) for i in range(self.vocab_size)]

    def _as_known(self, text: str) -> str:
        """Replaces signs that the vocabulary lacks by another spelling that it holds ("’" by "'", or back)."""
        for letter in set(text) - self._letters:
            spelling = next((other for other in _SPELLINGS.get(letter, "") if other in self._letters), letter)
            text = text.replace(letter, spelling)
        return text

    def _encode_word(self, word: str, dropout: float, draw) -> list[int]:
        """Merges letters, best rank first; each possible merge may be dropped at every step."""
        parts = list(word)
        while len(parts) > 1:
            best_rank, best = None, -1
            for i in range(len(parts) - 1):
                found = self._pieces.get(parts[i] + parts[i + 1])
                if found and (best_rank is None or found[0] < best_rank) and draw() >= dropout:
                    best_rank, best = found[0], i
            if best_rank is None:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [self._pieces[part][1] if part in self._pieces else _UNKNOWN for part in parts]

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids as text in normal form.

        Args:
          ids: ids in [0, V), without padding.

        Returns:
          The text; an unknown character appears as " ⁇ ".
        """
        return re.sub(r"\s+", " ", self._processor.decode([int(i) for i in ids])).strip()


def _join_unknown(ids: list[int]) -> list[int]:
    """Joins each run of unknown characters to one id, as sentencepiece's encoder does."""
    return [x for i, x in enumerate(ids) if x != _UNKNOWN or i == 0 or ids[i - 1] != _UNKNOWN]


def _sample(captions: Iterable[str]) -> list[str]:
    """Returns the non-empty captions in normal form, or a seeded reservoir sample of too many."""
    draw, sample, seen = random.Random(0), [], 0
    for caption in captions:
        caption = normalize(caption[:_MAX_TRAINING_LENGTH])
        if not caption:
            continue
        seen += 1
        if len(sample) < _MAX_TRAINING_CAPTIONS:
            sample.append(caption)
        elif (place := draw.randrange(seen)) < _MAX_TRAINING_CAPTIONS:
            sample[place] = caption
    return sample
