"""Captions to ids and back: lower-cased byte-pair encoding with seeded BPE dropout.

Section 2.2 of Zero-Shot Text-to-Image Generation: captions are lower-cased and BPE-encoded, and in training
10% of the merges are dropped (BPE dropout, Provilkov et al. 2020), so that the prior meets many spellings of
a word.

sentencepiece trains and holds the vocabulary and does the plain encoding.  Its own dropout draws from one
generator per thread that cannot be seeded per caption, so dropout walks the merges here, in Python: without
it a resumed run could not repeat an interrupted one.  At dropout 0 both give the same ids (tested).

    T text positions    V text vocabulary
"""

from __future__ import annotations

import io
import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
from absl import logging
from etils import epath

from dalle_jax.errors import ConfigError, DataError
from dalle_jax.storage.files import write_atomically

_SPACE = "\u2581"  # what sentencepiece writes for the blank before a word
_UNKNOWN = 0
_NOT_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff" + _SPACE + "]")  # controls, lone surrogates
# More captions than this add nothing to the merge statistics but memory; a fixed sample is taken.
_MAX_TRAINING_CAPTIONS = 1_000_000
_MAX_TRAINING_LENGTH = 1000


def normalize(text: str) -> str:
    """The one normal form of a caption: NFKC, lower case, single blanks, no control characters.

    Args:
      text: any string.

    Returns:
      The normal form; empty where `text` holds nothing but blanks and control characters.
    """
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(_NOT_TEXT.sub(" ", text).split())


def encode_captions(model: Any, captions: Sequence[str], max_length: int) -> list[list[int]]:
    """What people asked for, as ids.

    Args:
      model: a `TextModel`, or what encodes like one.
      captions: at least one, none empty.
      max_length: captions that are longer are cut to so many ids, with a warning.

    Raises:
      DataError: no caption, or an empty one.
    """
    if not captions:
        raise DataError("No caption was given; expected at least one.")
    rows = []
    for caption in captions:
        ids, truncated = model.encode(caption, max_length=max_length)
        if not ids:
            raise DataError(f"The caption {caption!r} is empty; give a few words of what the picture should show.")
        if truncated:
            logging.warning("Caption cut to %d tokens: %r", max_length, caption)
        rows.append(ids)
    return rows


class TextModel:
    """A BPE vocabulary.  Make one with `TextModel.train` or `TextModel.load`.

    Attributes:
      vocab_size: V; ids lie in [0, V), and id 0 stands for characters that the vocabulary lacks.
    """

    def __init__(self, serialized: bytes, origin: str = "the given bytes"):
        """Wraps a serialized sentencepiece model.

        Args:
          serialized: the content of a `sentencepiece.model` file.
          origin: where it came from, for the error message.

        Raises:
          DataError: where the bytes are not a BPE model of sentencepiece.
        """
        try:
            if not serialized:  # sentencepiece would accept it, and answer nothing
                raise RuntimeError("empty")
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=serialized)
            self.vocab_size: int = self._processor.vocab_size()
        except RuntimeError as error:
            raise DataError(
                f"The text model in {origin} cannot be read ({len(serialized)} bytes): it is not a model of "
                "sentencepiece, or it is damaged. Give the file that training wrote, or delete it."
            ) from error
        self._serialized = serialized
        # In a BPE model a piece's score is minus its rank among the merges: the highest goes first.
        self._pieces = {
            self._processor.id_to_piece(i): (-self._processor.get_score(i), i)
            for i in range(self.vocab_size)
            if not self._processor.is_unknown(i) and not self._processor.is_control(i)
        }

    def __reduce__(self):  # worker processes receive the model as its bytes
        return TextModel, (self._serialized,)

    @classmethod
    def load(cls, path: str | epath.PathLike) -> TextModel:
        """Reads the model from a file, local or remote.

        Args:
          path: the `sentencepiece.model` file.

        Raises:
          DataError: where there is no such file, or it is not a sentencepiece model.
        """
        try:
            serialized = epath.Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"No text model at {path}: {error}. Training writes `sentencepiece.model`; give that file."
            ) from error
        return cls(serialized, str(path))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int, path: str | epath.PathLike | None = None) -> TextModel:
        """Learns a vocabulary; the same captions in the same order give the same model.

        Args:
          captions: the training captions, in any case.
          vocab_size: the most ids to use.  A small corpus has fewer pieces to offer and gets a smaller
          vocabulary.
          path: where to write the model, as one file; nothing is written where it is None.

        Returns:
          The trained model.

        Raises:
          DataError: where there is no caption with text in it.
          ConfigError: where `vocab_size` does not even hold the letters that occur.
        """
        sample = _sample(captions)
        if not sample:
            raise DataError(
                "There is no caption to train the text model on: every caption given was empty. "
                "Check the data source and its caption key."
            )
        # Letters are never merged away, so a vocabulary crowded by rare ones (large multilingual corpora) has
        # no room for words.  There the rarest twentieth of a percent of the text becomes <unk>.
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
        """Writes the model as one file, local or remote; makes its folder where needed."""
        write_atomically(path, self._serialized)

    def encode(
        self, text: str, *, max_length: int, dropout: float = 0.0, seed: int | None = None
    ) -> tuple[list[int], bool]:
        """Turns a caption into ids, without padding.

        Args:
          text: the caption, in any case; blanks alone give no ids.
          max_length: T, the most ids to return.
          dropout: the chance for each possible merge to be left out each time it is considered, in [0, 1).
          seed: the draw of the dropout; the same seed gives the same ids.

        Returns:
          At most T ids in [0, V), and whether more were cut off.

        Raises:
          ValueError: where dropout is asked for without a seed, or does not lie in [0, 1).
        """
        text = normalize(text)
        if dropout == 0.0:
            ids = self._processor.encode(text)
        elif seed is None or not 0.0 < dropout < 1.0:
            raise ValueError(f"BPE dropout {dropout}, seed {seed}: it must lie in [0, 1) and needs a seed.")
        else:
            draw = random.Random(seed).random
            words = [self._encode_word(_SPACE + word, dropout, draw) for word in text.split()]
            ids = _join_unknown([i for word in words for i in word])
        return ids[:max_length], len(ids) > max_length

    def _encode_word(self, word: str, dropout: float, draw) -> list[int]:
        """Merges letters, best rank first; at every step each possible merge is dropped by chance."""
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
        """Turns ids back into text, in normal form.

        Args:
          ids: ids in [0, V), without padding.

        Returns:
          The text; an unknown character shows as " ⁇ ".
        """
        return re.sub(r"\s+", " ", self._processor.decode([int(i) for i in ids])).strip()


def _join_unknown(ids: list[int]) -> list[int]:
    """A run of unknown characters is one id, as in sentencepiece's own encoder."""
    return [x for i, x in enumerate(ids) if x != _UNKNOWN or i == 0 or ids[i - 1] != _UNKNOWN]


def _sample(captions: Iterable[str]) -> list[str]:
    """The captions in normal form, without empty ones; a seeded reservoir where there are too many."""
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
