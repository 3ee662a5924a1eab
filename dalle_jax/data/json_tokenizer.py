"""Text models of published priors: a `tokenizer.json` of Hugging Face, read by the package `tokenizers`.

V text vocabulary without padding
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from dalle_jax.data.byte_pairs import tokenizers_package
from dalle_jax.errors import DataError, UserError
from dalle_jax.storage import checksummed

_WORD_END = "</w>"


class JsonTokenizer:
    """A vocabulary of Hugging Face whose last id is that of padding. It is a `CaptionModel`.

    Attributes:
      vocab_size: V; ids lie in [0, V), and V is the file's id of padding.
    """

    file_name = "tokenizer.json"
    takes_dropout = False

    def __init__(self, content: bytes, padding: str = "[PAD]", origin: str = "the given bytes"):
        """Reads a vocabulary.

        Args:
          content: the file `tokenizer.json`.
          padding: its token of padding. No caption gets it.
          origin: the file, for messages.

        Raises:
          DataError: the file is none of this kind, its last id is not that of padding, or `tokenizers` is missing.
        """
        self._content, self._padding = content, padding
        try:
            self._tokenizer = tokenizers_package().Tokenizer.from_str(content.decode())
        except UserError:
            raise
        except Exception as error:  # the package raises plain `Exception`
            raise DataError(
                f"{origin} cannot be read as a text model ({type(error).__name__}: {error}); expected a tokenizer.json "
                "of Hugging Face."
            ) from error
        # These settings override the file's. No caption may give a special token by its spelling. Nothing is truncated
        # or padded here, and dropout has no seed in this package.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if hasattr(self._tokenizer.model, "dropout"):
            self._tokenizer.model.dropout = None
        self._unknown = self._tokenizer.token_to_id(getattr(self._tokenizer.model, "unk_token", None) or "")
        count, number = self._tokenizer.get_vocab_size(), self._tokenizer.token_to_id(padding)
        if number != count - 1 or count < 2:
            raise DataError(
                f"{origin} has {count} ids, and {padding} has the id {number}; expected the last one, {count - 1}, "
                "because the padding of a prior comes after all words."
            )
        self.vocab_size: int = number

    @classmethod
    def from_bytes(cls, content: bytes, origin: str) -> JsonTokenizer:
        """Reads the content of a `tokenizer.json`; `origin` names it in messages. Errors as in `__init__`."""
        return cls(content, origin=origin)

    @classmethod
    def of_char_bpe(cls, folder: str | os.PathLike, unknown: str = "[UNK]", padding: str = "[PAD]") -> JsonTokenizer:
        """Builds the lower-cased `CharBPETokenizer` of a folder with one `*vocab.json` and one `*merges.txt`.

        Args:
          folder: local or remote folder.
          unknown: token of unknown letters.
          padding: token of padding; added at the end if the vocabulary lacks it.

        Raises:
          DataError: a file is missing or damaged, or `tokenizers` is missing.
        """
        tokenizers, files = tokenizers_package(), []
        for ending in ("vocab.json", "merges.txt"):
            found = sorted(epath.Path(folder).glob(f"*{ending}"))
            if len(found) != 1:
                raise DataError(f"{folder} has {len(found)} files *{ending}; expected one of each kind.")
            files.append(str(found[0]))
        try:
            vocab, merges = tokenizers.models.BPE.read_file(*files)
            model = tokenizers.models.BPE(vocab, merges, unk_token=unknown, end_of_word_suffix=_WORD_END)
        except Exception as error:  # the package raises plain `Exception`
            raise DataError(f"{folder} cannot be read as a vocabulary: {error}. Download both files again.") from error
        made = tokenizers.Tokenizer(model)
        made.add_special_tokens([unknown, padding])
        normalizers = tokenizers.normalizers
        made.normalizer = normalizers.Sequence([normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()])
        made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        made.decoder = tokenizers.decoders.BPEDecoder(suffix=_WORD_END)
        return cls(made.to_str().encode(), padding, str(folder))

    @staticmethod
    def recognises(document: Any) -> bool:
        """Returns whether a JSON document is a tokenizer of Hugging Face."""
        return isinstance(document, dict) and "model" in document and "added_tokens" in document

    def __reduce__(self):  # worker processes receive the model as its bytes
        return JsonTokenizer, (self._content, self._padding)

    def save(self, path: str | epath.PathLike) -> None:
        """Writes the model and its checksum (`NAME.sha256`), local or remote; creates the folder if needed."""
        checksummed.write(path, self._content)

    def encode(
        self, text: str, *, max_length: int, dropout: float = 0.0, seed: int | None = None
    ) -> tuple[list[int], bool]:
        """Encodes a caption as ids, without padding; see `TextModel.encode`.

        Raises:
          ValueError: a dropout, which this model does not have.
        """
        del seed
        if dropout:
            raise ValueError(f"A tokenizer.json has no seeded BPE dropout; {dropout} was given.")
        ids = self._tokenizer.encode(text).ids
        return ids[:max_length], len(ids) > max_length

    def unknown_letters(self, text: str) -> str:
        """Returns the different letters of a caption that have no id."""
        encoded = self._tokenizer.encode(text)
        spans = [span for number, span in zip(encoded.ids, encoded.offsets) if number == self._unknown]
        return "".join(dict.fromkeys(letter for start, end in spans for letter in text[start:end]))

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes ids in [0, V) as text."""
        return self._tokenizer.decode([int(i) for i in ids]).strip()
