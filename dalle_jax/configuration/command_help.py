"""The text of `--help`: a config file's variants and the keys that people set, with their values and meaning."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dalle_jax.configuration import shipped
from dalle_jax.configuration.config_files import load_module
from dalle_jax.errors import ConfigError

_COMMAND = "python -m dalle_jax.main"
_FLAGS = {"--help": "short", "-help": "short", "-h": "short", "--help=all": "all"}
_VALUE_WIDTH = 48  # column of the meanings


def split(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Returns the help that a command line asks for ("short", "all" or None), and the rest of the command line.

    Raises:
      ConfigError: a value of --help that does not exist.
    """
    asked = [argument for argument in argv if argument in _FLAGS or argument.startswith("--help=")]
    if unknown := [argument for argument in asked if argument not in _FLAGS]:
        raise ConfigError(f"{unknown[0]}: expected --help or --help=all.")
    kinds = {_FLAGS[argument] for argument in asked}
    kind = "all" if "all" in kinds else "short" if kinds else None
    return kind, [argument for argument in argv if argument not in asked]


def overview(folder: str | Path = shipped.FOLDER) -> str:
    """Returns the help for a command line without --config: the configs in `folder`."""
    names = shipped.names(Path(folder))
    lines = [f"Usage: {_COMMAND} --config=NAME[:VARIANT] [--workdir=DIR] [--config.KEY=VALUE ...]", ""]
    if names:
        titles = [_title((Path(folder) / f"{name}.py").read_text(encoding="utf-8")) for name in names]
        lines += ["Configs; --config=NAME --help lists the variants and keys of one:"]
        lines += _columns(zip(names, titles))
        lines += ["", "--config=configs/NAME.py is the same. The path of another config file works too."]
    else:
        lines += [f"There is no folder {folder}: give the path of a config file."]
    lines += ["", "--helpfull lists every flag, with those for several hosts and those of the libraries."]
    return "\n".join(lines)


def describe(given: str, config: ConfigDict, everything: bool = False) -> str:
    """Returns the help for a config file.

    Args:
      given: the value of --config, such as "prior:paper" or "configs/prior.py".
      config: the configuration that it gave, with the values of the command line.
      everything: list all keys instead of those that people set.

    Raises:
      ConfigError: no such file.
    """
    file = given.partition(":")[0]
    module = load_module(file)
    meanings: Mapping[str, str] = getattr(module, "KEYS", {})
    variants = getattr(module, "VARIANTS", {})
    values = dict(_leaves(config.to_dict()))
    shown = values if everything or not meanings else meanings
    chosen = config.get("variant", given.partition(":")[2]) or next(iter(variants), "")

    lines = [f"{file}: {_title(module.__doc__ or '', parsed=True)}", ""]
    lines += [f"Usage: {_COMMAND} --config={file}{'[:VARIANT]' if variants else ''} [--config.KEY=VALUE ...]", ""]
    if variants:
        lines += [f"Variants (without one: {next(iter(variants))}):"]
        lines += _columns((name, row["doc"]) for name, row in variants.items())
        lines += [""]
    lines += [f"Keys, with their values{f' in {chosen}' if chosen else ''}:"]
    lines += _columns(
        ((f"{key}={values[key]!r}", meanings.get(key, "")) for key in shown if key in values), _VALUE_WIDTH
    )
    if shown is meanings:
        lines += ["", "--help=all lists all keys with their values."]
    return "\n".join(lines)


def _title(text: str, parsed: bool = False) -> str:
    """Returns the first line of a docstring; of a file's source unless it is `parsed` already."""
    docstring = text if parsed else ast.get_docstring(ast.parse(text)) or ""
    return docstring.strip().partition("\n")[0]


def _columns(rows: Iterable[tuple[str, str]], width: int = 0) -> list[str]:
    """Returns lines of two columns. The first is as wide as its longest entry, but at most `width` if that is set."""
    rows = list(rows)
    longest = max((len(first) for first, _ in rows), default=0)
    return [f"  {first.ljust(min(longest, width or longest))}  {second}".rstrip() for first, second in rows]


def _leaves(section: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yields the keys of a nested dict by dotted name, with their values. An empty section is a value."""
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
