"""The table of importers, and the recognition of a file that belongs to another of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dalle_jax.checkpoints import workdir
from dalle_jax.errors import ConfigError, PretrainedError, UserError
from dalle_jax.pretrained import (
    clip,
    dalle_mini,
    inception,
    llamagen,
    lpips,
    maskgit,
    mindalle,
    openai_dvae,
    rudalle,
    state_dict,
    vqgan,
)
from dalle_jax.pretrained.importer import Importer
from dalle_jax.storage import hub

_ALL = (
    *vqgan.IMPORTERS, *llamagen.IMPORTERS, *rudalle.IMPORTERS, *maskgit.IMPORTERS, *dalle_mini.IMPORTERS,
    mindalle.IMPORTER, openai_dvae.IMPORTER, clip.IMPORTER, inception.IMPORTER, lpips.IMPORTER,
)  # fmt: skip
IMPORTERS: dict[str, Importer] = {one.name: one for one in _ALL}
_MODULE_CLASSES = frozenset().union(*(one.module_classes for one in IMPORTERS.values()))


def import_files(name: str, files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports published weights into a folder.

    Args:
      name: a key of `IMPORTERS`.
      files: the files of the weights, as `Importer.files` says; local, or on a hub ("hf://owner/name/file").
      output: folder to write.
      settings: values of `Importer.settings` by name. The default stands for an absent one. Files may be on a hub, too.

    Returns:
      What was found, in one line.

    Raises:
      ConfigError: another number of files, or a folder in which a training works.
      PretrainedError: a file is missing, damaged, incomplete, or of another model. The message names that model's
        importer, if there is one.
    """
    one = IMPORTERS[name]
    if len(files) != len(one.files):
        expected = " ".join(f"--weights={file}" for file in one.files)
        raise ConfigError(f"{len(files)} files were given. {name} needs {len(one.files)}: {expected}.")
    if workdir.has_config(output):
        raise ConfigError(f"--output={output} is the workdir of a training. Give a new folder.")
    files = [hub.download_checked(file) if hub.is_hub(file) else file for file in files]
    defaults = {setting.name: setting.default for setting in one.settings}
    settings = {
        key: hub.download_checked(value) if isinstance(value, str) and hub.is_hub(value) else value
        for key, value in settings.items()
    }
    try:
        return one.run(files, output, {**defaults, **settings})
    except PretrainedError as error:
        for file in files:
            others = importers_of(file)
            if others and name not in others:
                raise PretrainedError(
                    f"{file} holds the weights of {others[0]}, not of {name}: import it with "
                    f"`python -m dalle_jax.pretrained {others[0]}`. ({error})"
                ) from error
        raise


def importers_of(file: str | os.PathLike) -> list[str]:
    """Returns the names of all importers that a file belongs to, by its arrays. Models can share a tokenizer."""
    try:
        arrays = state_dict.read(file, _MODULE_CLASSES)
    except UserError:
        return []
    return [one.name for one in IMPORTERS.values() if one.claims(arrays)]
