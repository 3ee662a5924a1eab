"""Reads files of weights in the usual formats as arrays by name.

The formats are safetensors, npz, `torch.save` (a state dict or a pickled module) and `torch.jit.save`. Torch is not
needed, and no code in a file is executed, see `restricted_pickle`.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from dalle_jax.errors import PretrainedError
from dalle_jax.pretrained import restricted_pickle

_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read(path: str | os.PathLike, module_classes: frozenset[str] = frozenset()) -> dict[str, np.ndarray]:
    """Reads the arrays of a file. Its format is detected from the content, not from the suffix.

    Args:
      path: a safetensors or npz file, or a file of `torch.save` or `torch.jit.save`. It holds a state dict, alone or
        under the key "state_dict", or a module.
      module_classes: classes that a pickled module may contain, as "module.Class".

    Returns:
      Arrays by name, in the dtype of the file.

    Raises:
      PretrainedError: the file does not exist, is damaged or of an unknown format, or its pickle needs another class.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(9)
            is_npz = zipfile.is_zipfile(file) and any(n.endswith(".npy") for n in zipfile.ZipFile(file).namelist())
        if is_npz:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        if head[8:] == b"{":
            return _read_safetensors(path)
    except (OSError, ValueError, KeyError, TypeError, struct.error, zipfile.BadZipFile) as error:
        raise PretrainedError(f"{path} cannot be read as weights: {error}") from error
    content = restricted_pickle.load(path, module_classes.__contains__)
    if isinstance(content, restricted_pickle.Record):
        return restricted_pickle.module_parameters(content)
    if isinstance(content, Mapping):
        content = content.get("state_dict", content)
    if isinstance(content, Mapping) and all(isinstance(value, np.ndarray) for value in content.values()):
        return dict(content)
    raise PretrainedError(
        f"{path} holds a {type(content).__name__}: expected a state dict (name → tensor) or a module."
    )


def _read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a safetensors file: a length, a JSON header and the bytes of the arrays."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > os.path.getsize(path):
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
        data = file.read()
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            arrays[name] = np.frombuffer(data[start:end], _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays
