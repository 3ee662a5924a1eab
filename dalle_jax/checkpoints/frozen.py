"""Saves and loads a trained module: options.json and params.msgpack.

    options.json      written last: if it exists, the module is complete
    params.msgpack

Folders may be local or remote ("gs://…").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
from etils import epath

from dalle_jax.errors import CheckpointError
from dalle_jax.pytree import PyTree
from dalle_jax.storage.files import expanded, write_atomically, write_errors, write_json
from dalle_jax.storage.reachable import check_reachable


def exists(folder: epath.PathLike) -> bool:
    """Returns whether the folder holds a complete module."""
    check_reachable(folder)
    return (expanded(folder) / "options.json").exists()


def save(folder: epath.PathLike, options: Mapping[str, Any], params: PyTree) -> None:
    """Writes both files.

    Args:
      folder: created if it does not exist.
      options: JSON values that describe the module.
      params: tree of arrays.

    Raises:
      UserError: a file cannot be written.
    """
    folder = expanded(folder)
    with write_errors(folder):
        write_atomically(folder / "params.msgpack", flax.serialization.msgpack_serialize(jax.device_get(params)))
    write_json(folder / "options.json", options)


def load(folder: epath.PathLike, remedy: str) -> tuple[dict[str, Any], PyTree]:
    """Reads both files.

    Args:
      folder: see `save`.
      remedy: what to do about damage, for the message.

    Returns:
      The options, and the parameters as JAX arrays.

    Raises:
      CheckpointError: a file is missing or damaged.
    """
    folder = expanded(folder)
    try:
        options = json.loads((folder / "options.json").read_text())
        params = flax.serialization.msgpack_restore((folder / "params.msgpack").read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}. {remedy}") from error
    return options, jax.tree.map(jnp.asarray, params)
