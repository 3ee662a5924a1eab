"""Reads files of weights in the usual formats as arrays by name.

The formats are safetensors, npz, `torch.save` (a state dict or a pickled module), `torch.jit.save` and Flax's msgpack.
Torch is not needed, and no code in a file is executed, see `restricted_pickle`.
"""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import jax
import ml_dtypes
import numpy as np
from flax import linen as nn
from flax import traverse_util

from dalle_jax.errors import PretrainedError
from dalle_jax.pretrained import flax_msgpack, restricted_pickle
from dalle_jax.pytree import PyTree, by_path
from dalle_jax.storage import tensor_file

# Files that are often given in place of weights, by their first bytes in lower case.
_NOT_WEIGHTS = {
    b"version https://git-lfs": "a pointer of git-lfs and not the weights: run `git lfs pull`, or download the file",
    b"<!doctype": "a web page and not the weights: download the file itself",
    b"<html": "a web page and not the weights: download the file itself",
    b"<?xml": "an answer of a server (XML) and not the weights: download the file itself",
    b"{": "a JSON document, such as the index of a sharded model, and not the weights: give the file of the weights",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"bzh": "compressed by bzip2: unpack it first",
    b"\xfd7zxz": "compressed by xz: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"rar!": "a rar archive: unpack it first",
    b"\x93numpy": "a single array of numpy: give an npz file with all arrays by name",
    b"\x89hdf": "an HDF5 file, as Keras writes it, which is not supported: convert it to safetensors",
    b"gguf": "a GGUF file, which is not supported: give the weights as safetensors",
}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.\w+")
_WRAPPERS = re.compile(r"((module|model|_orig_mod|clip_model|clip)\.)+")  # data parallel, torch.compile, Lightning
_TABLES = ("state_dict", "model_state_dict", "model", "module")  # where trainings keep the state dict
_MAX_INFLATION, _FREE_BYTES = 20, 1 << 20  # of compressed arrays
_NAMED = 4  # arrays of a kind that a message names
# Objects that trainings store next to the weights: settings, callbacks, optimisers, random states. They become inert
# records, and nothing reads them.
_OF_TRAININGS = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|hydra|argparse|taming|ldm|torch\.optim|typing|enum)\.[\w.]+"
    r"|pathlib\.\w*Path|collections\.(defaultdict|Counter)|_codecs\.encode|datetime\.\w+"
    r"|copy_?reg\._reconstructor|(builtins|__builtin__)\.(int|long|float|complex|bool|str|unicode|bytes|list|tuple|dict|object)"
    r"|torch\.(Size|float16|float32|float64|bfloat16|int64)"
    r"|numpy\.(dtype|ndarray|(core|_core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer))"
)


def read(path: str | os.PathLike, module_classes: frozenset[str] = frozenset()) -> dict[str, np.ndarray]:
    """Reads the arrays of a file. Its format is detected from the content, not from the suffix.

    Args:
      path: a safetensors, npz or Flax msgpack file, or a file of `torch.save` or `torch.jit.save`. It holds a state
        dict, alone or under a key such as "state_dict", or a module.
      module_classes: classes that a pickled module may contain, as "module.Class".

    Returns:
      Arrays by name, in the dtype of the file. Prefixes of wrappers, such as "module." and "_orig_mod.", are removed.

    Raises:
      PretrainedError: the file does not exist, is damaged or of an unknown format, or its pickle needs another class.
    """
    try:
        head, is_npz = _look(path)
        if is_npz:
            return _unwrapped(_read_npz(path), path)
        if head[8:9] == b"{":
            return _unwrapped(_read_safetensors(path), path)
        if flax_msgpack.is_one(head):
            return flax_msgpack.read(path)
    except PretrainedError:
        raise
    except Exception as error:  # a damaged or hostile file can make the readers fail in any way
        raise PretrainedError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error
    try:
        content = restricted_pickle.load(
            path, lambda name: name in module_classes or _OF_TRAININGS.fullmatch(name) is not None
        )
    except PretrainedError as error:
        words = " ".join(head.decode("latin-1").split())
        if words.isascii() and words.isprintable():
            raise PretrainedError(f"{path} is a text and not the weights. It begins with {words!r}.") from error
        raise
    if isinstance(content, Mapping) and not _is_table(content):
        names = [name for name in _TABLES if _is_table(content.get(name)) or _is_module(content.get(name))]
        if len(names) > 1:
            raise PretrainedError(f"{path} holds several models: {', '.join(names)}. Save the one to import alone.")
        content = content[names[0]] if names else content
    if _is_module(content):
        try:
            content = restricted_pickle.module_parameters(content)
        except PretrainedError as error:
            raise PretrainedError(f"{path}: {error}") from error
    if not _is_table(content):
        keys = f" with the keys {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, Mapping) else ""
        raise PretrainedError(
            f"{path} holds a {type(content).__name__}{keys}: expected a state dict (name → tensor) or a module."
        )
    return _unwrapped(content, path)


def _look(path: str | os.PathLike) -> tuple[bytes, bool]:
    """Returns the first 64 bytes of a file, and whether it is an npz file; raises on what is no file of weights."""
    if not os.path.isfile(path):  # reading a pipe or a device may never end
        kind = "is not a file" if os.path.exists(path) else "does not exist"
        raise PretrainedError(f"{path} {kind}: give the file of the weights.")
    with open(path, "rb") as file:
        head = file.read(64)
        is_zip = zipfile.is_zipfile(file)
        is_npz = is_zip and any(name.endswith(".npy") for name in zipfile.ZipFile(file).namelist())
    start = head.removeprefix(_BYTE_ORDER_MARK).lstrip().lower()
    if not start:
        raise PretrainedError(f"{path} is empty: download it again.")
    for known, found in _NOT_WEIGHTS.items():
        if start.startswith(known):
            raise PretrainedError(f"{path} is {found}.")
    if head.startswith(b"PK") and not is_zip:
        raise PretrainedError(f"{path} is an archive that ends too early: download it again.")
    if (shard := _SHARD.fullmatch(os.path.basename(path))) and int(shard[2]) > 1:
        raise PretrainedError(f"{path} is one of {shard[2]} shards: join them to one file of weights first.")
    return head, is_npz


def _is_table(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(name, str) and isinstance(value, np.ndarray) for name, value in content.items()
    )


def _is_module(content: Any) -> bool:
    return isinstance(content, restricted_pickle.Record)


def _unwrapped(arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Removes the prefixes that wrappers of a model put before the names of its arrays."""
    plain: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        short = name[found.end() :] if (found := _WRAPPERS.match(name)) else name
        if short in plain:
            raise PretrainedError(f"{path} holds {short[:200]!r} twice, with and without the prefix of a wrapper.")
        plain[short] = array
    return plain


def as_float32(name: str, array: np.ndarray) -> np.ndarray:
    """Converts a weight to float32.

    Args:
      name: its name, for messages.
      array: any shape.

    Raises:
      PretrainedError: it holds no floats (it is quantised, for instance), NaN or infinity, or numbers too large.
    """
    if not (np.issubdtype(array.dtype, np.floating) or array.dtype == ml_dtypes.bfloat16):
        raise PretrainedError(f"The array {name[:200]!r} holds {array.dtype}, not floats. Is the model quantised?")
    with np.errstate(over="ignore"):
        converted = np.asarray(array, np.float32)
    if not np.isfinite(converted).all():
        found = "NaN" if np.isnan(converted).any() else "infinity, or numbers too large for float32"
        raise PretrainedError(f"The array {name[:200]!r} holds {found}: the weights are damaged.")
    return converted


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
      PretrainedError: an array is missing, unexpected, or has another shape.
    """
    params = traverse_util.unflatten_dict(arrays)
    expected = by_path(nn.meta.unbox(jax.eval_shape(init, jax.random.key(0))))
    try:
        check_shapes(by_path(params), {path: leaf.shape for path, leaf in expected.items()})
    except PretrainedError as error:
        raise PretrainedError(f"The weights do not fit {options}: {error}") from error
    return params


def check_shapes(arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the names and shapes of arrays with those of a model.

    Args:
      arrays: arrays by name.
      expected: shapes by name.

    Raises:
      PretrainedError: arrays are missing, unexpected, or have another shape. The message names the first of each.
    """
    missing = [name for name in expected if name not in arrays]
    extra = [f"{name[:200]} {list(array.shape)}" for name, array in arrays.items() if name not in expected]
    others = [
        f"{name} {list(arrays[name].shape)} (expected {list(shape)})"
        for name, shape in expected.items()
        if name in arrays and arrays[name].shape != tuple(shape)
    ]
    kinds = ((missing, "missing"), (extra, "unexpected"), (others, "of another shape"))
    if words := [f"{len(names)} of {len(expected)} arrays {kind}: {_some(names)}" for names, kind in kinds if names]:
        raise PretrainedError(f"{'. '.join(words)}.")


def _some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + rest


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
    with open(path, "rb") as file:
        return tensor_file.decode(file.read())
