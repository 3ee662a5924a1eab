"""Config files that other config files build on: `configs/prior.py` holds the config of its image tokenizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from dalle_jax.errors import ConfigError
from dalle_jax.options import closest

T = TypeVar("T")


def module(file: str | Path, name: str) -> ModuleType:
    """The Python file `name` that stands beside `file` (a config file's `__file__`).

    Config files are run by path, wherever they are, so they cannot import one another by name.

    Raises:
      ConfigError: where there is no such file.
    """
    path = Path(file).with_name(name)
    if not path.is_file():
        raise ConfigError(f"There is no config file {path}: run from the repository's root, or give its whole path.")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def choose(variants: Mapping[str, T], variant: str | None, file: str) -> tuple[str, T]:
    """The row of a config file's table of variants, with its name; the first one where `variant` is None.

    Raises:
      ConfigError: where there is no such variant; names those that there are.
    """
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise ConfigError(
            f"{Path(file).name} has no variant {variant!r}{closest(variant, variants)}; it has: {', '.join(variants)}."
        )
    return variant, variants[variant]
