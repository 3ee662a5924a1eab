"""The table of importers, and the recognition of a file that belongs to another of them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dalle_jax.checkpoints import workdir
from dalle_jax.errors import ConfigError, PretrainedError, UserError
from dalle_jax.pretrained import clip, inception, lpips, openai_dvae, state_dict, vqgan
from dalle_jax.pretrained.importer import Importer

IMPORTERS: dict[str, Importer] = {
    one.name: one for one in (*vqgan.IMPORTERS, openai_dvae.IMPORTER, clip.IMPORTER, inception.IMPORTER, lpips.IMPORTER)
}
_MODULE_CLASSES = frozenset().union(*(one.module_classes for one in IMPORTERS.values()))


def import_files(name: str, files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports published weights into a folder.

    Args:
      name: a key of `IMPORTERS`.
      files: the files of the weights, as `Importer.files` says.
      output: folder to write.
      settings: values of `Importer.settings` by name. The default stands for an absent one.

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
    defaults = {setting.name: setting.default for setting in one.settings}
    try:
        return one.run(files, output, {**defaults, **settings})
    except PretrainedError as error:
        for file in files:
            if (other := importer_of(file)) not in (None, name):
                raise PretrainedError(
                    f"{file} holds the weights of {other}, not of {name}: import it with "
                    f"`python -m dalle_jax.pretrained {other}`. ({error})"
                ) from error
        raise


def importer_of(file: str | os.PathLike) -> str | None:
    """Returns the name of the importer that a file belongs to, by its arrays, or None if there is none."""
    try:
        arrays = state_dict.read(file, _MODULE_CLASSES)
    except UserError:
        return None
    return next((one.name for one in IMPORTERS.values() if one.claims(arrays)), None)
