"""Loads config files: `load("prior:paper")`, or by path: `load("configs/prior.py:paper")`.

Config files of one package folder import each other by name (`from configs import dvae`), from any working directory.
Your own files import those of this package in the same way.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from ml_collections import ConfigDict

from dalle_jax.configuration import shipped
from dalle_jax.configuration.flag_errors import explain_config_error
from dalle_jax.configuration.options import closest
from dalle_jax.errors import ConfigError

T = TypeVar("T")


def load(config: str, option: str = "config") -> ConfigDict:
    """Loads the configuration "FILE[:VARIANT]".

    Args:
      config: "prior:paper", "configs/prior.py" or "configs/prior.py:paper".
      option: name of the option that was given, for messages.

    Raises:
      ConfigError: no such file or variant, or the file is not a config.
    """
    path, _, variant = config.partition(":")
    if not Path(path).name:
        raise ConfigError(f"{option}={config!r} names no file; expected a config such as prior:paper.")
    loaded = load_module(path)
    try:
        return loaded.get_config(*([variant] if variant else []))
    except (TypeError, AttributeError) as error:
        if explained := explain_config_error(error, f"{option}={config}"):
            raise explained from None
        raise


def load_module(path: str | Path) -> ModuleType:
    """Executes a config file and returns it as a module, with its `get_config`, `VARIANTS` and `KEYS`.

    Raises:
      ConfigError: no such file, or it is not a Python file.
    """
    path = shipped.located(str(path))
    if not Path(path).is_file():
        raise ConfigError(f"There is no config {path}; {shipped.instead_of(path)}.")
    if Path(path).suffix != ".py":
        raise ConfigError(f"{path} is not a Python file; expected a config file such as configs/prior.py.")
    spec = importlib.util.spec_from_file_location(f"config_{Path(path).stem}", path)
    loaded = importlib.util.module_from_spec(spec)
    with importable(path):
        spec.loader.exec_module(loaded)
    return loaded


def given(argv: Sequence[str]) -> str:
    """Returns the value of --config on a command line, "" if there is none."""
    for place, argument in enumerate(argv):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            return value if equals else "".join(argv[place + 1 : place + 2])
    return ""


@contextlib.contextmanager
def importable(config: str) -> Iterator[None]:
    """Context in which a config file can import the other files of its package: `from configs import dvae`.

    Config files are executed by path, and their package may be outside of Python's search path. A folder is a package
    if it has an `__init__.py`. The package `configs` can be imported too, after all others.

    Args:
      config: path of the config file, with or without a variant. "": no file.
    """
    folder = Path(config.partition(":")[0]).absolute().parent
    own = [str(folder.parent)] if config and (folder / "__init__.py").is_file() else []
    ours = str(shipped.FOLDER.parent)
    sys.path[:0] = own
    sys.path.append(ours)
    try:
        yield
    finally:
        for place in own:
            sys.path.remove(place)
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(ours)]


def choose(variants: Mapping[str, T], variant: str | None, file: str) -> tuple[str, T]:
    """Returns the name and the row of a variant. None or "" chooses the first one.

    Args:
      variants: the config file's table.
      variant: its name.
      file: the config file, for messages.

    Raises:
      ConfigError: no such variant; the message lists those that exist.
    """
    variant = variant or next(iter(variants))
    if variant not in variants:
        raise ConfigError(
            f"{Path(file).name} has no variant {variant!r}{closest(variant, variants)}; it has: {', '.join(variants)}."
        )
    return variant, variants[variant]
