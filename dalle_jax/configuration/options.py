"""From sections of a configuration to typed options, and what to say where that fails.

`ConfigDict` stops here: whatever is built from a configuration takes a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dalle_jax.errors import ConfigError

T = TypeVar("T")


def closest(word: str, candidates: Iterable[str]) -> str:
    """' (did you mean "x"?)' for the candidate nearest to `word`, '' where none is near."""
    near = difflib.get_close_matches(word, list(candidates), n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def from_config(cls: type[T], section: Mapping[str, Any], where: str) -> T:
    """Builds the dataclass `cls` from a section of a configuration.

    Args:
      cls: a dataclass.
      section: mapping of its fields (a ConfigDict); absent fields take their defaults.
      where: name of the section, for messages.

    Raises:
      ConfigError: a key that is not a field, or a missing field that has no default.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [key for key in section if key not in fields]
    if unknown:
        raise ConfigError(
            f"config.{where} has no key {unknown[0]!r}{closest(unknown[0], fields)}. It has: {', '.join(fields)}."
        )
    missing = [
        name
        for name, field in fields.items()
        if name not in section and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"config.{where} lacks {', '.join(missing)}.")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in section.items()})
