"""Saves and loads a trained module: options.json and its parameters.

    options.json         with the checksums of both files; written last: if it exists, the module is complete
    params.msgpack       or, in an exported folder,
    model.safetensors

Earlier versions wrote no checksums. Their modules are read unchecked. Folders may be local or remote ("gs://…").
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dalle_jax.errors import CheckpointError, DamagedError
from dalle_jax.pytree import PyTree, by_path, nested
from dalle_jax.storage import json_files, tensor_file
from dalle_jax.storage.checksummed import checksum, say_unchecked
from dalle_jax.storage.errors import storage_cause
from dalle_jax.storage.files import expanded, write_atomically, write_errors, write_json
from dalle_jax.storage.reachable import check_reachable

MSGPACK, SAFETENSORS = "params.msgpack", "model.safetensors"


def exists(folder: epath.PathLike) -> bool:
    """Returns whether the folder holds a complete module."""
    check_reachable(folder)
    return (expanded(folder) / "options.json").exists()


def save(folder: epath.PathLike, options: Mapping[str, Any], params: PyTree, name: str = MSGPACK) -> None:
    """Writes both files.

    Args:
      folder: created if it does not exist.
      options: JSON values that describe the module.
      params: tree of arrays.
      name: `MSGPACK` or `SAFETENSORS`, the file of the parameters.

    Raises:
      UserError: a file cannot be written.
    """
    folder = expanded(folder)
    given = jax.device_get(params)
    content = tensor_file.encode(by_path(given)) if name == SAFETENSORS else flax.serialization.msgpack_serialize(given)
    sums = {name: checksum(content), "options": _of_json(options)}
    with write_errors(folder):
        write_atomically(folder / name, content)
    write_json(folder / "options.json", {**options, "checksums": sums})


def load(folder: epath.PathLike, remedy: str) -> tuple[dict[str, Any], PyTree]:
    """Reads both files.

    Args:
      folder: see `save`.
      remedy: what to do about damage, for the message.

    Returns:
      The options, and the parameters as JAX arrays. Those that an export stored in bfloat16 are float32 again.

    Raises:
      DamagedError: a file is missing, or changed since it was written.
      CheckpointError: the storage cannot be read.
    """
    folder = expanded(folder)
    options = json_files.read(folder / "options.json", dict, DamagedError, remedy)
    try:
        sums = options.pop("checksums", None)
        if sums is None:
            say_unchecked(str(folder))
        elif sums["options"] != _of_json(options):
            raise ValueError("options.json changed since it was written")
        name = SAFETENSORS if sums is not None and SAFETENSORS in sums else MSGPACK
        content = (folder / name).read_bytes()
        if sums is not None and sums[name] != checksum(content):
            raise ValueError(f"{name} changed since it was written")
        if name == SAFETENSORS:
            wide = lambda x: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x
            params = nested({path: wide(x) for path, x in tensor_file.decode(content).items()})
        else:
            params = flax.serialization.msgpack_restore(content)
    except MemoryError:
        raise
    except Exception as error:  # without checksums, msgpack raises many types for damaged content
        if (cause := storage_cause(error)) is not None:
            raise CheckpointError(f"Cannot read {folder}: {cause}.") from error
        raise DamagedError(f"{folder} is damaged: {str(error) or type(error).__name__}. {remedy}") from error
    return options, jax.tree.map(jnp.asarray, params)


def _of_json(options: Mapping[str, Any]) -> str:
    """Returns the checksum of JSON values. It does not depend on the order of keys."""
    return checksum(json.dumps(options, sort_keys=True).encode())
