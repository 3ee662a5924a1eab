"""Reads files of weights in the usual formats as arrays by name.

The formats are safetensors, npz, `torch.save` (a state dict or a pickled module) and `torch.jit.save`. Torch is not
needed, and no code in a file is executed, see `restricted_pickle`.
"""

from __future__ import annotations

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dalle_jax.errors import PretrainedError
from dalle_jax.pretrained import restricted_pickle
from dalle_jax.pytree import PyTree, first_mismatch

_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
# Files that downloads leave behind instead of weights, by their first bytes in lower case.
_NOT_WEIGHTS = {
    b"version https://git-lfs": "a pointer of git-lfs and not the weights: run `git lfs pull`, or download the file",
    b"<!doctype": "a web page and not the weights: download the file itself",
    b"<html": "a web page and not the weights: download the file itself",
}
_MAX_INFLATION, _FREE_BYTES = 20, 1 << 20  # of compressed arrays


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
            head = file.read(64)
            is_npz = zipfile.is_zipfile(file) and any(n.endswith(".npy") for n in zipfile.ZipFile(file).namelist())
        for start, found in _NOT_WEIGHTS.items():
            if head.lstrip().lower().startswith(start):
                raise PretrainedError(f"{path} is {found}.")
        if is_npz:
            return _read_npz(path)
        if head[8:9] == b"{":
            return _read_safetensors(path)
    except PretrainedError:
        raise
    except Exception as error:  # a damaged or hostile file can make the readers fail in any way
        raise PretrainedError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error
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


def as_parameters(
    arrays: Mapping[tuple[str, ...], np.ndarray], init: Callable[[jax.Array], PyTree], options: Any
) -> PyTree:
    """Nests converted arrays and compares their names and shapes with those of the model.

    Args:
      arrays: arrays by path in the parameters.
      init: the model's `init`, a function of a key.
      options: the model's options, for messages.

    Returns:
      Parameters of the model.

    Raises:
      PretrainedError: an array is missing, unexpected, has another shape, or holds numbers that are not finite.
    """
    for path, array in arrays.items():
        if not np.isfinite(array).all():
            raise PretrainedError(f"The array {'/'.join(path)} holds NaN or infinity: the weights are damaged.")
    params = traverse_util.unflatten_dict(arrays)
    if mismatch := first_mismatch(params, nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))):
        path, given, needed = mismatch
        raise PretrainedError(f"The weights do not fit {options}: array {path} has shape {given}, expected {needed}.")
    return params


def _read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the arrays of an npz file, each after its size was compared with that of its archive member."""
    arrays: dict[str, np.ndarray] = {}
    limit = _MAX_INFLATION * os.path.getsize(path) + _FREE_BYTES
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > limit:
            raise ValueError(f"its arrays are more than {_MAX_INFLATION} times larger than the file")
        for entry in archive.infolist():
            if not entry.filename.endswith(".npy"):
                continue
            with archive.open(entry) as file:
                shape, fortran_order, dtype = _read_npy_header(file)
                count = math.prod(shape)
                if dtype.hasobject or count * dtype.itemsize > entry.file_size:
                    raise ValueError(f"{entry.filename} is shorter than its header says, or holds Python objects")
                array = np.frombuffer(file.read(count * dtype.itemsize), dtype)
            arrays[entry.filename.removesuffix(".npy")] = array.reshape(shape, order="F" if fortran_order else "C")
    return arrays


def _read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads a safetensors file: a length, a JSON header and the bytes of the arrays."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > os.path.getsize(path):
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(length))
        data = file.read()
    arrays, total = {}, 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if not 0 <= start <= end <= len(data):
            raise ValueError(f"the array {name!r} lies outside of the file")
        total += end - start
        if total > len(data):
            raise ValueError("its arrays overlap")
        arrays[name] = np.frombuffer(data[start:end], _SAFETENSORS_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays
