"""Checks of single values: whole numbers, finite numbers, seeds. Options and the arguments of methods use the same.

A message names the value, its name and what was expected: "n is 2.5; expected a whole number, at least 1."
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from dalle_jax.errors import ConfigError, UserError

LARGEST = 2**31 - 1  # of a whole number, because arrays and programs count in int32
_SEEDS = 2**32
_LARGEST_STORED = 2**63 - 1  # of a whole number in JSON, NumPy and file sizes
_LARGEST_FLOAT = 3.4028234663852886e38  # of float32, in which programs compute
SMALLEST_FLOAT = 2.0**-126  # above 0: the smallest number of float32 that devices do not round to 0
_SHOWN = 80  # letters of a value in a message


def shown(value: Any) -> str:
    """Returns a value as messages show it: its repr in one line, shortened."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not print whole numbers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def is_whole(value: Any) -> bool:
    """Returns whether a value is a whole number. True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns whether a value is a finite number of float32. True, False, NaN, infinity and 1e39 are none."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and abs(value) <= _LARGEST_FLOAT


def natural(name: str, value: Any, least: int = 0, most: int = LARGEST, error: type[UserError] = ConfigError) -> int:
    """Checks a whole number.

    Args:
      name: of the value, for the message: "n" or "config.batch_size".
      value: the value given. A NumPy integer is a whole number, True and 2.0 are none.
      least: the smallest allowed number.
      most: the largest allowed number.
      error: class of the error.

    Returns:
      The number as an int.

    Raises:
      error: another value.
    """
    if not (is_whole(value) and least <= value <= most):
        raise error(f"{name} is {shown(value)}; expected {whole_number(least, most)}.")
    return int(value)


def whole_number(least: int = 0, most: int = LARGEST) -> str:
    """Describes the whole numbers in [least, most], for messages."""
    above = f"a whole number, at least {least}"
    return f"{above} and at most {most}" if most < LARGEST else above


def finite(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    error: type[UserError] = ConfigError,
) -> float:
    """Checks a finite number.

    Args:
      name: of the value, for the message: "guidance" or "config.optimizer.b2".
      value: the value given. An int is a number, True, NaN, infinity and "1" are none.
      low, high: the smallest and the largest allowed number.
      above, below: bounds that are not allowed themselves.
      error: class of the error.

    Returns:
      The number as a float.

    Raises:
      error: another value.
    """
    if not (is_number(value) and low <= value <= high and above < value < below):
        raise error(f"{name} is {shown(value)}; expected {number(low, high, above, below)}.")
    return float(value)


def number(low: float = -math.inf, high: float = math.inf, above: float = -math.inf, below: float = math.inf) -> str:
    """Describes the numbers within the bounds of `finite`, for messages."""
    bounds = [(low, "at least"), (above, "above"), (high, "at most"), (below, "below")]
    words = [f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound)]
    return "a finite number" + (f", {' and '.join(words)}" if words else "")


def check_seed(seed: Any, name: str = "seed", error: type[UserError] = ConfigError) -> int:
    """Checks a seed: a whole number in [0, 2**32). Random keys of 32 bits would repeat those of smaller seeds.

    Args:
      seed: the value given.
      name: of the seed, for the message: "seed" or "config.seed".
      error: class of the error.

    Returns:
      The seed as an int.

    Raises:
      error: another value.
    """
    if not (is_whole(seed) and 0 <= seed < _SEEDS):
        raise error(f"{name} is {shown(seed)}; expected a whole number from 0 to {_SEEDS - 1}.")
    return int(seed)


def mismatch(hint: Any, value: Any) -> str | None:
    """Compares a value with the type of its field.

    Args:
      hint: the annotation: bool, int, float, str, a dataclass, `tuple[T, ...]`, `Mapping[str, T]` or a union with None
        of one of them. Any other annotation allows every value.
      value: the value given. An int is a float; True is neither; NaN and infinity are none.

    Returns:
      The description of what was expected, for messages, or None if the value has the type.
    """
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        found = [mismatch(one, value) for one in arguments]
        return None if None in found else " or ".join(found)
    if hint is types.NoneType:
        return None if value is None else "None"
    if hint is bool:
        return None if isinstance(value, bool) else "True or False"
    if hint is int:
        return None if is_whole(value) and abs(value) <= _LARGEST_STORED else "a whole number"
    if hint is float:
        return None if is_number(value) else "a finite number"
    if hint is str:
        return None if isinstance(value, str) else "a text"
    if origin is tuple and arguments[1:] == (...,):
        found = [mismatch(arguments[0], one) for one in value] if isinstance(value, tuple) else ["no tuple"]
        return next((f"a tuple; {one} at each place" for one in found if one), None)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else [(None, None)]
        found = [mismatch(arguments[0], key) or mismatch(arguments[1], one) for key, one in pairs]
        return next((f"a mapping; {one} for each key" for one in found if one), None)
    if dataclasses.is_dataclass(hint):
        return None if isinstance(value, hint) else f"the keys of {hint.__name__}"
    return None
