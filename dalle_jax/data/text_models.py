"""The kinds of text models that a prior can have: recognises the file of one by its content, and loads it."""

from __future__ import annotations

from etils import epath

from dalle_jax.data.dalle_mini_text import DalleMiniText
from dalle_jax.data.json_tokenizer import JsonTokenizer
from dalle_jax.data.labels import Labels
from dalle_jax.data.text import CaptionModel, TextModel
from dalle_jax.data.youtokentome import YouTokenToMe
from dalle_jax.errors import DataError
from dalle_jax.storage import checksummed
from dalle_jax.storage.files import expanded
from dalle_jax.storage.json_files import parse

_JSON_KINDS = (Labels, DalleMiniText, JsonTokenizer)
FILE_NAMES = tuple(kind.file_name for kind in (TextModel, YouTokenToMe, *_JSON_KINDS))  # in a workdir


def load(path: str | epath.PathLike) -> CaptionModel:
    """Reads a text model of any kind from a file, local or remote.

    Args:
      path: the file. Its content decides the kind, not its name.

    Raises:
      DataError: there is no such file, or it is no text model.
      DamagedError: it changed since `save` wrote it.
    """
    try:
        content = checksummed.read(expanded(path))
    except OSError as error:
        raise DataError(
            f"No text model at {path}: {error}. Training writes `sentencepiece.model`; give that file."
        ) from error
    if content.lstrip()[:1] == b"{":
        try:
            document = parse(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"The text model {path} is damaged JSON: {error}.") from error
        for kind in _JSON_KINDS:
            if kind.recognises(document):
                return kind.from_bytes(content, str(path))
    if YouTokenToMe.recognises(content):
        return YouTokenToMe(content, str(path))
    return TextModel(content, str(path))
