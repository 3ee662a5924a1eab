"""Writes and reads arrays by name in the safetensors format: a length, a JSON header and the bytes of the arrays.

Nothing in such a file is executed. A header that names bytes outside of the file is rejected before anything is read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_LARGEST_HEADER = 10 << 20  # bytes of the JSON header


def encode(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the content of a safetensors file. The same arrays give the same bytes.

    Args:
      arrays: arrays by name.
      metadata: texts by name for the header.
    """
    # The library reads the memory of an array, which therefore must not be a transposed view.
    whole = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in arrays.items()}
    return save(whole, metadata=None if metadata is None else dict(metadata))


def decode(content: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of a safetensors file, as views of its bytes.

    Args:
      content: all bytes of the file.

    Raises:
      ValueError: the file is damaged, or hostile. Other types of errors are possible for a header of another structure.
    """
    (length,) = struct.unpack_from("<Q", content)
    if length > min(len(content), _LARGEST_HEADER):
        raise ValueError("it ends too early, or its header is too long")
    header, data = json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]
    arrays: dict[str, np.ndarray] = {}
    total = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        if not 0 <= start <= end <= len(data):
            raise ValueError(f"the array {name[:200]!r} lies outside of the file, which ends too early or is damaged")
        total += end - start
        if total > len(data):
            raise ValueError("its arrays overlap")
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"the array {name[:200]!r} has the dtype {entry['dtype']!r}, which is not supported")
        arrays[name] = np.frombuffer(data[start:end], _DTYPES[entry["dtype"]]).reshape(_shape(name, entry["shape"]))
    return arrays


def _shape(name: str, shape: Any) -> list[int]:
    if type(shape) is not list or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"the array {name[:200]!r} has the shape {str(shape)[:200]}")
    return shape
