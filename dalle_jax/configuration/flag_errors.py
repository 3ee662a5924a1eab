"""Explains errors of the command line and of config files in one line."""

from __future__ import annotations

import pathlib
import re
import traceback
from collections.abc import Sequence

import absl
import ml_collections

from dalle_jax.configuration.shipped import instead_of
from dalle_jax.errors import ConfigError, UserError

# Packages and modules that read flags and config files.
_ABSL, _ML_COLLECTIONS = (pathlib.Path(package.__file__).parent for package in (absl, ml_collections))
# Part of a message about a flag's value: the kind of value that was expected.
_EXPECTED = {
    "literal for int": "a whole number",
    "string to float": "a number",
    "Non-boolean": "true or false",
    "as a ConfigDict": "one of the keys inside this section (--help=all lists them)",
}
_VALUE = "<unknown>"  # the name of the file in a syntax error of a flag's value
_CONFIG_FILES = pathlib.Path(__file__).with_name("config_files.py")


def explain_config_error(error: BaseException, given: str) -> ConfigError | None:
    """Explains why a file is not a config, or why it has no variants.

    Args:
      error: the exception from executing the file or from calling its `get_config`.
      given: the option that names the file, for the message.

    Returns:
      The error to raise, or None if the file itself has a fault.
    """
    if isinstance(error, SyntaxError) and not (error.filename or _VALUE).endswith((".py", _VALUE)):
        return ConfigError(f"{given}: not a Python file; expected a config such as prior or configs/prior.py.")
    if not _raised_in(error, _ML_COLLECTIONS, _CONFIG_FILES):
        return None
    if str(error).startswith("get_config() takes 0 positional arguments"):
        return ConfigError(f"{given}: this config has no variants; leave out the colon and the name after it.")
    if str(error).endswith("has no attribute 'get_config'"):
        return ConfigError(
            f"{given}: not a config, it has no get_config(); expected one such as prior or configs/prior.py."
        )
    return None


def _raised_in(error: BaseException, *places: pathlib.Path) -> bool:
    """Returns whether one of `places`, folders or files, holds the code that raised `error`."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and any(pathlib.Path(frames[-1].filename).is_relative_to(place) for place in places)


def explain_flag_error(error: Exception, argv: Sequence[str]) -> Exception:
    """Explains an error of absl's or ml_collections' flag parsing.

    Args:
      error: the error.
      argv: the command line.

    Returns:
      The error to raise: the `ConfigError` that a config file raised; or one that states in one line what is wrong with
      the command; or `error` itself if the config file has a fault, because then its traceback is needed.
    """
    text, cause = str(error).replace("\\", ""), error
    config = next((arg for arg in argv if arg.startswith("--config=")), "--config")
    while cause is not None:  # the flag parser wraps an error that the config file raised
        found, cause = cause, cause.__cause__ or cause.__context__
        if isinstance(found, UserError) and not str(found).startswith("Error whilst parsing"):
            return found
        if explained := explain_config_error(found, config):
            return explained
    if "Error whilst parsing config file" in text or not _raised_in(error, _ABSL, _ML_COLLECTIONS):
        return error
    if isinstance(error, OSError):
        return ConfigError(f"{config}: no such config; {instead_of(config.partition('=')[2].partition(':')[0])}.")
    if isinstance(error, (KeyError, AttributeError)) and (key := re.search(r"'(\w+)'", text)):
        given = next((arg for arg in argv if f".{key[1]}" in arg), "The command")
        near = re.search(r'Did you mean "(\w+)"', text)
        outer = re.match(rf"--config\.((?:\w+\.)*?){key[1]}\b", given)
        section = outer[1] if outer else ""
        hint = f' (did you mean "{section}{near[1]}"?)' if near else ""
        return ConfigError(f"{given}: the configuration has no key {section + key[1]!r}{hint}.")
    if flag := re.match(r"flag (--config\.[\w.]+)=(.*?): ", text):
        expected = next((kind for found, kind in _EXPECTED.items() if found in text), None)
        if expected and flag[1] == "--config.tokenizer":
            expected += f". An image tokenizer that exists is given by --config.tokenizer_from={flag[2]}"
        if expected:
            return ConfigError(f"{flag[1]}={flag[2]}: expected {expected}.")
    return ConfigError(" ".join(text.split()))
