"""Config files that other config files build on: `configs/prior.py` holds the config of its image tokenizer."""
from __future__ import annotations

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict

from dalle_jax.errors import ConfigError
from dalle_jax.options import closest


def load(path: str | Path, variant: str | None = None) -> ConfigDict:
    """Runs `get_config(variant)` of a config file.

    Args:
      path: the file, without a variant.
      variant: what follows the colon in `--config=configs/prior.py:emoji`; None for the file's default.

    Raises:
      ConfigError: where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"There is no config file {path}: run from the repository's root, or give its whole path.")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config() if variant is None else module.get_config(variant)


def sibling(file: str, name: str, variant: str | None = None) -> ConfigDict:
    """The config `name` that stands beside the config file `file` (its `__file__`)."""
    return load(Path(file).with_name(name), variant)


def choose(variants: dict, variant: str, file: str):
    """The row of a config file's table of variants.

    Raises:
      ConfigError: where there is no such variant; names those that there are.
    """
    if variant not in variants:
        raise ConfigError(
            f"{Path(file).name} has no variant {variant!r}{closest(variant, variants)}; it has: {', '.join(variants)}."
        )
    return variants[variant]
