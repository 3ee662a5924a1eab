"""Explains errors of the command line and of config files in one line."""

from __future__ import annotations

import pathlib
import re
import traceback
from collections.abc import Sequence

import absl
import ml_collections

from dalle_jax.errors import ConfigError, UserError

# Packages and modules that read flags and config files.
_ABSL, _ML_COLLECTIONS = (pathlib.Path(package.__file__).parent for package in (absl, ml_collections))
_CONFIG_FILES = pathlib.Path(__file__).with_name("config_files.py")


def explain_config_error(error: BaseException, given: str) -> ConfigError | None:
    """What to raise where a file could not be run as a config because it is none, or has no variants.

    Args:
      error: what running the file, or calling its `get_config`, raised.
      given: the option that names it, for the message.

    Returns:
      None where the file itself has a fault.
    """
    if isinstance(error, SyntaxError) and not (error.filename or "").endswith(".py"):
        return ConfigError(f"{given}: not a Python file; expected a config file such as configs/prior.py.")
    if not _raised_in(error, _ML_COLLECTIONS, _CONFIG_FILES):
        return None
    if str(error).startswith("get_config() takes 0 positional arguments"):
        return ConfigError(f"{given}: this config has no variants; leave out the colon and what follows it.")
    if str(error).endswith("has no attribute 'get_config'"):
        return ConfigError(f"{given}: no config, for it has no get_config(); expected one such as configs/prior.py.")
    return None


def _raised_in(error: BaseException, *places: pathlib.Path) -> bool:
    """Returns whether one of `places`, folders or files, holds the code that raised `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(pathlib.Path(frames[-1].filename).is_relative_to(place) for place in places)


def explain_flag_error(error: Exception, argv: Sequence[str]) -> Exception:
    """What to raise for an error that absl's or ml_collections' flag parsing raised.

    Args:
      error: the error.
      argv: the command line.

    Returns:
      The `ConfigError` that a config file raised; else one that says in a line what is wrong with the command; the
      error itself where the config file has a fault (its traceback is needed).
    """
    text, cause = str(error).replace("\\", ""), error
    config = next((arg for arg in argv if arg.startswith("--config=")), "--config")
    while cause is not None:  # a config file's own refusal, wrapped by the flag parser
        found, cause = cause, cause.__cause__ or cause.__context__
        if isinstance(found, UserError) and not str(found).startswith("Error whilst parsing"):
            return found
        if refused := explain_config_error(found, config):
            return refused
    if "Error whilst parsing config file" in text or not _raised_in(error, _ABSL, _ML_COLLECTIONS):
        return error
    if isinstance(error, OSError):
        return ConfigError(f"{config}: no such file; run from the repository's root, or give its whole path.")
    if isinstance(error, (KeyError, AttributeError)) and (key := re.search(r"'(\w+)'", text)):
        given = next((arg for arg in argv if f".{key[1]}" in arg), "The command")
        near = re.search(r'Did you mean ("\w+")', text)
        hint = f" (did you mean {near[1]}?)" if near else ""
        return ConfigError(f"{given}: the configuration has no key {key[1]!r}{hint}.")
    return ConfigError(" ".join(text.split()))
