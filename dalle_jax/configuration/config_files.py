"""Config files that are read by others: `configs/prior.py` holds the config of its image tokenizer, and
`configs/compile.py` takes any training's."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from ml_collections import ConfigDict

from dalle_jax.configuration.flag_errors import explain_config_error
from dalle_jax.configuration.options import closest
from dalle_jax.errors import ConfigError

T = TypeVar("T")


def module(file: str | Path, name: str) -> ModuleType:
    """The Python file `name` that stands beside `file` (a config file's `__file__`).

    Config files are run by path, wherever they are, so they cannot import one another by name.

    Raises:
      ConfigError: where there is no such file, or it is not Python's.
    """
    path = Path(file).with_name(name)
    if not path.is_file():
        raise ConfigError(f"There is no config file {path}: run from the repository's root, or give its whole path.")
    if path.suffix != ".py":
        raise ConfigError(f"{path} is not a Python file; expected a config file such as configs/prior.py.")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def load(given: str, option: str) -> ConfigDict:
    """The config of "FILE[:VARIANT]".

    Args:
      given: "configs/prior.py:paper".
      option: which says so, for messages.

    Raises:
      ConfigError: where there is no such file or variant, or the file is no config.
    """
    path, _, variant = given.partition(":")
    if not Path(path).name:
        raise ConfigError(f"{option}={given!r} names no file; expected a config such as configs/prior.py:paper.")
    loaded = module(path, Path(path).name)
    try:
        return loaded.get_config(*([variant] if variant else []))
    except (TypeError, AttributeError) as error:
        if refused := explain_config_error(error, f"{option}={given}"):
            raise refused from None
        raise


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
