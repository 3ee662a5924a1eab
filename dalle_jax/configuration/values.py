"""Checks of single values: whole numbers, finite numbers, seeds. Options and the arguments of methods use the same.

A message names the value, its name and what was expected: "n is 2.5; expected a whole number, at least 1."
"""

from __future__ import annotations

import math
import numbers
from typing import Any

from dalle_jax.errors import ConfigError, UserError

LARGEST = 2**31 - 1  # of a whole number, because arrays and programs count in int32
_SEEDS = 2**32
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
    """Returns whether a value is a finite number that a float can hold. True, False, NaN and infinity are none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number above the largest float
        return False


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
