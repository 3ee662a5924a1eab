"""OpenAI's byte-level BPE: the captions of published CLIP weights.

The vocabulary is the user's own file: `bpe_simple_vocab_16e6.txt.gz` as OpenAI publishes it, or Hugging Face's
`tokenizer.json`, or the folder with its `vocab.json` and `merges.txt`. The package `tokenizers` does the encoding
(`pip install -e '.[clip]'`); of the original's clean-up it leaves out that of ftfy and of HTML: broken Unicode, curly
quotes, ligatures, wide characters and `&amp;` stay what they are.

On purpose unlike the original: a caption that spells `<|endoftext|>` or `<|startoftext|>` gets the ids of these
characters, not the special token, or it would be read only up to there.

    T text positions
"""

from __future__ import annotations

import gzip
import json
from typing import Any

from etils import epath

from dalle_jax.errors import DataError
from dalle_jax.storage.files import write_atomically

_START, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
_MERGES = 49_152 - 256 - 2  # of those in OpenAI's file, which holds more
# Contractions, runs of letters, single digits, runs of anything else.
_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


class BytePairs:
    """OpenAI's vocabulary; `encode` works as that of `TextModel`, which it stands in for.

    Attributes:
      end_id: the token that ends a caption.
    """

    def __init__(self, path: str | epath.PathLike):
        """Reads the vocabulary.

        Args:
          path: see the module's docstring.

        Raises:
          DataError: no such file, or not one of the three kinds; or the package `tokenizers` is missing.
        """
        path = epath.Path(path)
        try:
            if path.is_dir() or path.suffix == ".gz":
                self._tokenizer = _from_merges(*(_read_folder(path) if path.is_dir() else _read_merges(path)))
            else:
                self._tokenizer = _package().Tokenizer.from_str(path.read_text())
        except DataError:
            raise
        except Exception as error:  # the package raises plain `Exception` on what it cannot read
            raise DataError(
                f"{path} cannot be read as a vocabulary of CLIP ({type(error).__name__}: {error}): give OpenAI's "
                "bpe_simple_vocab_16e6.txt.gz, a tokenizer.json, or the folder of a vocab.json and merges.txt."
            ) from error
        # Whatever the file says: no caption makes a special token, neither by spelling it nor by an unknown character
        # (which a whole vocabulary does not have), and none is cut or filled up here.
        self._tokenizer.encode_special_tokens, self._tokenizer.model.unk_token = True, None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._start_id, self.end_id = (self._tokenizer.token_to_id(token) for token in (_START, _END))
        if self._start_id is None or self.end_id is None:
            raise DataError(f"{path} has no token {_START} or {_END}: it is not a vocabulary of CLIP.")

    def save(self, path: str | epath.PathLike) -> None:
        """Writes it as one `tokenizer.json`."""
        write_atomically(path, self._tokenizer.to_str().encode())

    def encode(self, text: str, *, max_length: int) -> tuple[list[int], bool]:
        """A caption as ids, with the start token and without the end token.

        Args:
          text: the caption.
          max_length: the most ids to return.

        Returns:
          The ids, none for an empty caption; and whether more were cut off.
        """
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        ids = [self._start_id, *ids] if ids else []
        return ids[:max_length], len(ids) > max_length


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise DataError(
            "Captions of published CLIP weights need the package `tokenizers`: pip install -e '.[clip]'."
        ) from error
    return tokenizers


def _read_folder(path: epath.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`vocab.json` and `merges.txt`: ids by token, and merges in order."""
    lines = (path / "merges.txt").read_text().splitlines()
    pairs = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    return json.loads((path / "vocab.json").read_text()), pairs


def _read_merges(path: epath.Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """OpenAI's file: the same, the vocabulary made from the merges."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    pairs = [tuple(line.split()) for line in lines[1 : 1 + _MERGES]]
    # Bytes are written as printable characters: these stand for themselves, the others for characters from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + _WORD_END for letter in letters] + ["".join(pair) for pair in pairs] + [_START, _END]
    return {token: i for i, token in enumerate(tokens)}, pairs


def _from_merges(vocab: dict[str, int], pairs: list[tuple[str, str]]) -> Any:
    """The tokenizer that CLIP's code describes."""
    package = _package()
    made = package.Tokenizer(package.models.BPE(vocab, pairs, end_of_word_suffix=_WORD_END))
    make, split = package.normalizers, package.pre_tokenizers
    made.normalizer = make.Sequence([make.NFC(), make.Replace(package.Regex(r"\s+"), " "), make.Lowercase()])
    made.pre_tokenizer = split.Sequence(
        [
            split.Split(package.Regex(_WORDS), "removed", invert=True),
            split.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return made
