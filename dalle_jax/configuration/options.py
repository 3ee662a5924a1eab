"""Typed options: frozen dataclasses, read from sections of a configuration and checked.

`ConfigDict` stops here: everything that is built from a configuration takes a frozen dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

from dalle_jax.configuration.values import LARGEST, SMALLEST_FLOAT, check_seed, is_whole, mismatch, shown
from dalle_jax.errors import ConfigError

T = TypeVar("T")


def closest(word: str, candidates: Iterable[str]) -> str:
    """Returns ' (did you mean "x"?)' for the candidate nearest to `word`, or '' if none is near."""
    near = difflib.get_close_matches(word, list(candidates), n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def from_config(cls: type[T], section: Mapping[str, Any], where: str, document: str = "config") -> T:
    """Builds the dataclass `cls` from a section of a configuration, or from JSON that was written from one.

    A field whose type is a dataclass is built from the section of that name. A list becomes a tuple.

    Args:
      cls: a dataclass.
      section: mapping of its fields (a ConfigDict or a dict). Absent fields keep their defaults.
      where: name of the section, for messages; "" for the whole document.
      document: the section's origin, for messages; a file name if it is not a configuration.

    Raises:
      ConfigError: a key is not a field, a field without a default is missing, or `cls` rejects a value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    name = f"{document}.{where}" if where else document
    if unknown := [key for key in section if key not in fields]:
        raise ConfigError(
            f"{name} has no key {unknown[0]!r}{closest(unknown[0], fields)}. It has: {', '.join(fields)}."
        )
    missing = [key for key, field in fields.items() if key not in section and not has_default(field)]
    if missing:
        raise ConfigError(f"{name} lacks {', '.join(missing)}.")
    types, values = _hints(cls), {}
    for key in section:
        value = section[key]
        if isinstance(value, Mapping) or hasattr(value, "to_dict"):
            value = plain(value)
            if dataclasses.is_dataclass(types[key]):
                value = from_config(types[key], value, f"{where}.{key}" if where else key, document)
        elif value is None and fields[key].default_factory is not dataclasses.MISSING:
            continue  # an empty mapping, which older configurations wrote as None
        values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return cls(**values)
    except ConfigError as error:
        if str(error).partition(" ")[0] in fields:  # of a class whose fields Python callers give by name, too
            raise ConfigError(f"{name}.{error}") from None
        raise


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def has_default(field: dataclasses.Field) -> bool:
    """Returns whether a dataclass field may be left out."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def plain(section: Any) -> dict[str, Any]:
    """Returns a section of a configuration as a plain dict."""
    return section.to_dict() if hasattr(section, "to_dict") else dict(section)


def defaults_of(cls: type) -> dict[str, Any]:
    """Returns the defaults of the dataclass `cls` by field, without the fields that have none."""
    fields = [field for field in dataclasses.fields(cls) if has_default(field)]
    return {f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory() for f in fields}


def check(
    options: Any,
    where: str | None,
    *,
    positive: Collection[str] = (),
    at_least_0: Collection[str] = (),
    share: Collection[str] = (),
    below_1: Collection[str] = (),
    odd: Collection[str] = (),
    seeds: Collection[str] = (),
    most: Mapping[str, float] | None = None,
    choices: Mapping[str, Collection[str]] | None = None,
) -> None:
    """Checks types, sizes and choices of an options dataclass.

    Every field must have the type of its annotation, see `values.mismatch`. Numbers must be finite. A field that may be
    None and is None is not checked further.

    Args:
      options: the dataclass.
      where: the section that it is read from, for messages: "model.trunk"; "" for the configuration itself; None for
        options that Python callers give by name, too.
      positive: fields that must be above 0.
      at_least_0: fields that must be 0 or above.
      share: fields that must lie in [0, 1].
      below_1: fields that must lie in [0, 1).
      odd: fields that must be odd; `positive` or `at_least_0` says which are possible.
      seeds: fields that are seeds, see `values.check_seed`.
      most: the largest value by field. Whole numbers in `positive` and `at_least_0` have at most 2**31 - 1 without it.
      choices: the allowed values by field.

    Raises:
      ConfigError: the first field that has another value; names the value, the expected ones, and the field.
    """
    prefix = "" if where is None else f"config.{where}." if where else "config."
    most = most or {}

    optional = {field.name for field in dataclasses.fields(options) if field.default is None}

    def require(name: str, allowed: bool, expected: str) -> None:
        if not allowed:
            none = ", or None" if name in optional else ""
            raise ConfigError(f"{prefix}{name} is {shown(getattr(options, name))}; expected {expected}{none}.")

    def values(names: Iterable[str]) -> Iterable[tuple[str, Any]]:
        return [(name, getattr(options, name)) for name in names if getattr(options, name) is not None]

    for name, hint in _hints(type(options)).items():
        if name not in optional or getattr(options, name) is not None:
            expected = mismatch(hint, getattr(options, name))
            require(name, expected is None, (expected or "").removesuffix(" or None"))
    for name, value in values(choices or {}):
        require(name, value in choices[name], f"one of {', '.join(choices[name])}")
    for name, value in values(positive):
        if is_whole(value):
            require(name, value >= 1, "at least 1")
        else:
            require(name, value >= SMALLEST_FLOAT, "a number above 0")
    for name, value in values(at_least_0):
        require(name, value >= 0, "0 or more")
    for name, value in values({*positive, *at_least_0, *most}):
        if name in most or is_whole(value):
            require(name, value <= most.get(name, LARGEST), f"at most {most.get(name, LARGEST):,}")
    for name, value in values(share):
        require(name, 0 <= value <= 1, "a number in [0, 1]")
    for name, value in values(below_1):
        require(name, 0 <= value < 1, "a number in [0, 1)")
    for name, value in values(odd):
        require(name, value == 0 or value % 2 == 1, "an odd number, or 0" if name in at_least_0 else "an odd number")
    for name, value in values(seeds):
        check_seed(value, prefix + name)
