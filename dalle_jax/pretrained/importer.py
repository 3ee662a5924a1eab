"""The record of an importer: what it imports, where its files come from, and the function that imports them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Setting:
    """An option of one importer on the command line, `--name=VALUE`.

    Attributes:
      name: its name.
      kind: int or str.
      help: its meaning.
      default: its value if it is not given.
      required: whether it must be given.
      choices: the allowed values, or None for all.
    """

    name: str
    kind: type
    help: str
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Importer:
    """Published weights that can be imported.

    Attributes:
      name: its name on the command line.
      title: the model in words.
      parameters: number of parameters, or None if files of several sizes are accepted.
      licence: under which the authors publish the weights.
      source: where the authors publish them.
      files: the published name of each file that is needed.
      use: the key or function that reads the output, for the last line of the command.
      run: imports files. Its arguments are the files, the output folder and the settings by name. Returns what it
        found, in one line. Raises a `PretrainedError`.
      claims: returns whether arrays, by name, are those of a file of this importer.
      settings: further options.
      module_classes: classes that a pickled module in its files contains, see `state_dict.read`.
    """

    name: str
    title: str
    parameters: int | None
    licence: str
    source: str
    files: tuple[str, ...]
    use: str
    run: Callable[[Sequence[str | os.PathLike], str, Mapping[str, Any]], str]
    claims: Callable[[Mapping[str, np.ndarray]], bool]
    settings: tuple[Setting, ...] = ()
    module_classes: frozenset[str] = frozenset()
