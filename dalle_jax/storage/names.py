"""Names of workdirs: which of them can be used, and how orbax can use those that look like patterns."""

from __future__ import annotations

import glob
import os
import unicodedata
from collections.abc import Iterator
from typing import Self

from etils import epath

from dalle_jax.errors import ConfigError
from dalle_jax.storage.files import full_path, is_remote

_NOT_IN_A_LINE = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are not UTF-8, ends of lines
_PATTERNS = "*?[]#"
_LONGEST_PATH = 3000  # bytes; systems allow 4,096, and checkpoints have long names


class LiteralPath(type(epath.Path("/"))):
    """A local path whose `glob` takes the path itself as it is, because a workdir may be named "a[b]"."""

    def glob(self, pattern: str) -> Iterator[Self]:
        """Yields what matches the pattern below this path."""
        for found in glob.glob(os.path.join(glob.escape(os.fspath(self)), pattern)):
            yield type(self)(found)


def check_name(workdir: epath.PathLike) -> None:
    """Raises a `ConfigError` for a name of a workdir whose files could not be read again.

    Tensorstore reads a backslash as a slash, and needs UTF-8. Messages and logs need names of one line.
    """
    name = os.fspath(workdir)
    if wrong := [each for each in name if each == "\\" or unicodedata.category(each) in _NOT_IN_A_LINE]:
        found = f"{wrong[0]!r}"
    elif is_remote(name) and not name.startswith("file://") and (wrong := [each for each in name if each in _PATTERNS]):
        found = f"{wrong[0]!r}, which object storage takes for a pattern"
    elif "**" in name:
        found = "'**', which epath takes for a pattern over many folders"
    elif len(os.fsencode(full_path(name))) > _LONGEST_PATH:
        found = f"{len(name):,} characters, and its whole path more than {_LONGEST_PATH:,} bytes"
    else:
        return
    shown = repr(name) if len(name) <= 100 else f"{name[:100]!r}…"
    raise ConfigError(f"The workdir {shown} cannot be used: its name has {found}. Give another --workdir=DIR.")
