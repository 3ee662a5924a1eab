"""Reads JSON that a disk, an interrupted copy or another program may have damaged.

Every JSON text that comes from a file is parsed here. The parser demands the kind of the document, because a damaged
file can be valid JSON of another kind: `null`, `[]`, `7`.
"""

from __future__ import annotations

import json
import os
from typing import Any, TypeVar

from etils import epath

from dalle_jax.errors import UserError
from dalle_jax.storage.errors import storage_cause
from dalle_jax.storage.files import is_other_than_file

_KINDS = {dict: "an object {…}", list: "a list […]"}
T = TypeVar("T", dict, list)


class WrongJson(ValueError):
    """A text is not JSON of the expected kind. The message says how, in a few words."""


def parse(content: bytes | str, kind: type[T] = dict) -> T:
    """Parses a JSON document.

    Args:
      content: UTF-8 bytes, or text.
      kind: `dict` or `list`, the kind that the whole document must have.

    Raises:
      WrongJson: it is not JSON of this kind.
    """
    try:
        found = json.loads(content.decode("utf-8") if isinstance(content, bytes) else content)
    except RecursionError:
        raise WrongJson("its brackets are nested too deeply") from None
    except UnicodeDecodeError as error:
        raise WrongJson(f"not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise WrongJson(f"no JSON: {error}" if content.strip() else "it is empty") from None
    if not isinstance(found, kind):
        raise WrongJson(f"expected {_KINDS[kind]}, found {_shown(found)}")
    return found


def read(path: epath.PathLike, kind: type[T], error: type[UserError], remedy: str) -> T:
    """Reads a JSON file.

    Args:
      path: local or remote file.
      kind: `dict` or `list`, see `parse`.
      error: class of the error to raise.
      remedy: what to do about damage, one or more sentences.

    Raises:
      UserError: of the class `error`. The file is missing, cannot be read, or is damaged.
    """
    try:
        if is_other_than_file(path):
            raise WrongJson("it is a folder" if os.path.isdir(path) else "it is no file")
        return parse(epath.Path(path).read_bytes(), kind)
    except WrongJson as wrong:
        raise error(f"{path} is damaged: {wrong}. {remedy}") from wrong
    except OSError as wrong:
        cause = storage_cause(wrong) or wrong.strerror or str(wrong)
        raise error(f"{path} cannot be read: {cause}. {remedy}") from wrong


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _KINDS[type(value)]
    return "a text" if isinstance(value, str) else json.dumps(value)[:40]
