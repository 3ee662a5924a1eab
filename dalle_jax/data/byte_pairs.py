"""OpenAI's byte-level BPE, which encodes captions for published CLIP weights.

The user supplies the vocabulary: OpenAI's `bpe_simple_vocab_16e6.txt.gz`, Hugging Face's `tokenizer.json`, or the
folder with its `vocab.json` and `merges.txt`. The package `tokenizers` encodes (`pip install -e '.[clip]'`). The
original also cleans captions with ftfy and decodes HTML, which is left out here. Broken Unicode, curly quotes,
ligatures, wide characters and `&amp;` therefore stay unchanged.

One difference from the original is deliberate. A caption that spells `<|endoftext|>` or `<|startoftext|>` gets the ids
of these characters instead of the special token, because the model would ignore everything after that token.

    T text positions
"""

from __future__ import annotations

import gzip
import json
from typing import Any

from etils import epath

from dalle_jax.errors import DataError, UserError
from dalle_jax.storage import checksummed

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_MERGES = 49_152 - 256 - 2  # used of OpenAI's file, which holds more
# Contractions, runs of letters, single digits, runs of anything else.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class BytePairs:
    """OpenAI's vocabulary, a `CaptionEncoder` like `TextModel`.

    Attributes:
      end_id: the token that ends a caption.
    """

    def __init__(self, path: str | epath.PathLike):
        """Reads the vocabulary.

        Args:
          path: a file or folder of one of the three kinds above.

        Raises:
          DataError: if there is no such file, it is of another kind, or the package `tokenizers` is missing.
          DamagedError: if it changed since `save` wrote it.
        """
        path = epath.Path(path)
        try:
            if path.is_dir() or path.suffix == ".gz":
                self._tokenizer = _from_merges(*(_read_folder(path) if path.is_dir() else _read_merges(path)))
            else:
                self._tokenizer = tokenizers_package().Tokenizer.from_str(checksummed.read(path).decode())
        except UserError:
            raise
        except Exception as error:  # the package raises plain `Exception` for unreadable files
            raise DataError(
                f"{path} cannot be read as a vocabulary of CLIP ({type(error).__name__}: {error}): give OpenAI's "
                "bpe_simple_vocab_16e6.txt.gz, a tokenizer.json, or the folder of a vocab.json and merges.txt."
            ) from error
        # These settings override the file's. No caption may give a special token, neither by its spelling nor by an
        # unknown character (a complete vocabulary knows all). Nothing is truncated or padded here.
        self._tokenizer.encode_special_tokens, self._tokenizer.model.unk_token = True, None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._start_id, self.end_id = (self._tokenizer.token_to_id(token) for token in (_START, _END))
        if self._start_id is None or self.end_id is None:
            raise DataError(f"{path} has no token {_START} or {_END}: it is not a vocabulary of CLIP.")

    def save(self, path: str | epath.PathLike) -> None:
        """Writes the vocabulary as one `tokenizer.json`, and its checksum."""
        checksummed.write(path, self._tokenizer.to_str().encode())

    def encode(self, text: str, *, max_length: int) -> tuple[list[int], bool]:
        """Encodes a caption as ids, with the start token and without the end token.

        Args:
          text: the caption.
          max_length: the most ids to return.

        Returns:
          The ids (none for an empty caption), and whether more were cut off.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        ids = [self._start_id, *ids] if ids else []
        return ids[:max_length], len(ids) > max_length

    def unknown_letters(self, text: str) -> str:
        """Returns "": the vocabulary holds every byte."""
        return ""


def tokenizers_package() -> Any:
    """Imports the package `tokenizers`; raises a `DataError` if it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "Captions of published weights need the package `tokenizers`: pip install -e '.[clip]'."
        ) from error
    return tokenizers


def _read_folder(path: epath.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads `vocab.json` and `merges.txt`; returns ids by token, and merges in order."""
    lines = (path / "merges.txt").read_text().splitlines()
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return json.loads((path / "vocab.json").read_text()), pairs


def _read_merges(path: epath.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Reads OpenAI's file and derives the vocabulary from its merges; returns the same as `_read_folder`."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    pairs = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]
    # Bytes are written as printable characters. Printable bytes stand for themselves, others map to 256 and above.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + _WORD_END for letter in letters] + ["".join(pair) for pair in pairs] + [_START, _END]
    return {token: i for i, token in enumerate(tokens)}, pairs


def _from_merges(vocab: dict[str, int], pairs: list[tuple[str, str]]) -> Any:
    """Returns the tokenizer that CLIP's code describes."""
    package = tokenizers_package()
    tokenizer = package.Tokenizer(package.models.BPE(vocab, pairs, end_of_word_suffix=_WORD_END))
    make, split = package.normalizers, package.pre_tokenizers
    tokenizer.normalizer = make.Sequence([make.NFC(), make.Replace(package.Regex(r"\s+"), " "), make.Lowercase()])
    tokenizer.pre_tokenizer = split.Sequence(
        [
            split.Split(package.Regex(_WORDS), "removed", invert=True),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer
