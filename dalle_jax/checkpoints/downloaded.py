"""Exported folders on a hub ("hf://owner/name"): downloads the files that export.json lists."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

from absl import logging

from dalle_jax.checkpoints import exported
from dalle_jax.errors import DamagedError, HubError
from dalle_jax.storage import hub, json_files


def local(folder: Any) -> Any:
    """Returns the folder on this machine that an address stands for; other paths are returned unchanged.

    Args:
      folder: "hf://owner/name" or "hf://owner/name@revision", the export of a model, or any other path.

    Raises:
      ConfigError: an address that cannot be read.
      HubError: there is no such repository, it holds no export, or the hub cannot be reached.
      DamagedError: its export.json is damaged.
    """
    return _download(folder) if hub.is_hub(folder) else folder


@functools.cache  # one request for each address and process, so that all parts of a program see one revision
def _download(folder: str) -> str:
    address = hub.parse(folder)
    if address.file is not None:
        raise HubError(f"{folder} names a file: give hf://{address.repo}, the whole repository of an exported model.")
    try:
        first = hub.download(dataclasses.replace(address, file=exported.NAME))
    except hub.MissingFile as error:
        raise HubError(
            f"{folder} is no model that `python -m dalle_jax.export` wrote. {error} Weights of other programs are "
            "imported by `python -m dalle_jax.pretrained`."
        ) from error
    found = exported.parse(json_files.read(first, dict, DamagedError, "Download it again."), first)
    place = os.path.dirname(first)
    commit = os.path.basename(place)
    for name in found["files"]:
        hub.download(hub.Address(address.repo, commit, name))
    logging.info("%s: commit %s, in %s", folder, commit, place)
    return place
