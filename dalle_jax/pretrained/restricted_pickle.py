"""Reads arrays from files of `torch.save`, without torch and without trusting the file.

A pickle is a program, so unrestricted unpickling runs any code of its author. This reader allows a short list of names:
tensors, storages, containers, and the classes of network modules, which become inert records of their attributes. Any
other name raises an error.

The reader supports both containers of `torch.save`, the zip archive (torch ≥ 1.6) and the older sequence of pickles. It
also reads the modules of `torch.jit.save`. Their classes are part of the file and become records too.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dalle_jax.errors import PretrainedError

_DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# The first numbers of the older container.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# Prefix of the classes that a file of `torch.jit.save` defines itself.
_SCRIPTED = "__torch__."
# Functions of `torch.jit.save` that mark the type of a container.
_TYPE_MARKS = {
    f"torch.jit._pickle.{name}"
    for name in ("restore_type_tag", "build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
}


class Record:
    """Stands for an object of the file and holds only the name of its class and its attributes.

    Attributes:
      qualified_name: "module.Class" as in the file, set per class by the reader.
      state: attributes from the file.
    """

    qualified_name = ""
    __slots__ = ("state",)

    def __new__(cls, *arguments: Any):
        record = super().__new__(cls)
        record.state = {"arguments": arguments} if arguments else {}
        return record

    def __init__(self, *arguments: Any):
        del arguments

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"the state of {self.qualified_name} is not a dictionary")
        self.state = {**self.state, **state}


@dataclasses.dataclass(eq=False)
class _Storage:
    """A flat array. In the older container its content follows the objects that refer to it."""

    dtype: np.dtype
    numel: int
    data: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class _Tensor:
    """A view of a storage, which becomes an array after all storages are read."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or any(type(n) is not int or n < 0 for n in numbers):
            raise PretrainedError(f"Damaged file: a tensor of size {self.size} and strides {self.stride}.")
        count = math.prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        if count > self.storage.numel or (count and last >= self.storage.numel):
            raise PretrainedError(
                f"Damaged file: a tensor of size {self.size} reaches beyond its storage of {self.storage.numel} "
                "numbers."
            )
        if not count:
            return np.zeros(self.size, self.storage.dtype)
        strides = tuple(step * self.storage.dtype.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(self.storage.data[self.offset :], self.size, strides).copy()


class _Function:
    """A callable from the list of allowed names, without attributes that a file could set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "_function", function)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function has no state")


class _StorageType:
    """The class of a storage, as a dtype. A bare `np.dtype` has a `__setstate__` that a file could call."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a storage class has no state")


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
    del rest  # requires_grad, hooks, metadata
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError("a tensor without a storage")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _rebuild_parameter(data: Any, *rest: Any) -> _Tensor:
    del rest  # requires_grad, hooks
    if not isinstance(data, _Tensor):
        raise pickle.UnpicklingError("a parameter that is not a tensor")
    return data


def _marked(value: Any, *mark: Any) -> Any:
    del mark
    return value


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles tensors, containers and inert records, and rejects every other name.

    Args:
      file: the pickle.
      inert: returns whether an unlisted class "module.Class" may become a `Record`.
      load_storage: maps (dtype, key, number of elements) to a storage.
    """

    def __init__(
        self,
        file: BinaryIO,
        inert: Callable[[str], bool],
        load_storage: Callable[[np.dtype, str, int], _Storage],
    ):
        super().__init__(file, encoding="utf-8")
        self._inert, self._load_storage = inert, load_storage
        self._records: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns the object for a name in the file.

        Raises:
          PretrainedError: the name is not allowed.
        """
        asked = f"{module}.{name}"
        if asked == "collections.OrderedDict":
            return collections.OrderedDict
        if asked in ("builtins.set", "__builtin__.set"):
            return _Function(set)
        if asked == "torch._utils._rebuild_tensor_v2":
            return _Function(_rebuild_tensor)
        if asked == "torch._utils._rebuild_parameter":
            return _Function(_rebuild_parameter)
        if asked in _TYPE_MARKS:
            return _Function(_marked)
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if asked == "torch.device" or asked.startswith(_SCRIPTED) or self._inert(asked):
            if asked not in self._records:
                self._records[asked] = type(
                    name.rpartition(".")[2], (Record,), {"qualified_name": asked, "__slots__": ()}
                )
            return self._records[asked]
        raise PretrainedError(
            f"The file asks for {asked!r}, which weights do not need. It was rejected, no code was run. If you trust "
            "its origin, convert it to safetensors on the machine that wrote it."
        )

    def persistent_load(self, pid: Any) -> Any:
        """Returns a storage, or in the older container a module class, whose source text is dropped."""
        if isinstance(pid, tuple) and pid and pid[0] == "module" and isinstance(pid[1], type):
            return pid[1]
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], _StorageType)):
            raise pickle.UnpicklingError(f"an unknown reference {pid!r:.80}")
        _, storage_type, key, _, numel, *_ = pid
        if type(numel) is not int or numel < 0:
            raise pickle.UnpicklingError(f"a storage of {numel!r:.80} numbers")
        return self._load_storage(storage_type.dtype, str(key), numel)


def load(path: str | os.PathLike, inert: Callable[[str], bool] = lambda name: False) -> Any:
    """Reads a file of `torch.save`.

    Args:
      path: the file.
      inert: returns whether a class "module.Class" becomes a `Record`. Otherwise the file is rejected.

    Returns:
      The object, with numpy arrays in the dtype of the file in place of tensors, and `Record`s in place of modules.

    Raises:
      PretrainedError: the file does not exist, is damaged or of another format, or contains a name that is not allowed.
    """
    try:
        with open(path, "rb") as file:
            if zipfile.is_zipfile(file):
                return _resolve(_load_zip(file, inert), {})
            file.seek(0)
            return _resolve(_load_legacy(file, inert), {})
    except PretrainedError as error:
        raise PretrainedError(f"{path}: {error}") from error
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # a damaged or hostile pickle can make the unpickler fail in any way
        raise PretrainedError(f"{path} is not a readable file of weights: {error}") from error


def _load_zip(file: BinaryIO, inert: Callable[[str], bool]) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.split("/")[1:] == ["data.pkl"]]
        if len(names) != 1:
            raise PretrainedError("It is a zip archive, but not of torch.save, because it has no data.pkl.")
        root = names[0].removesuffix("data.pkl")
        read = [entry for entry in archive.infolist() if entry.filename.startswith((names[0], f"{root}data/"))]
        if any(
            entry.compress_type != zipfile.ZIP_STORED for entry in read
        ):  # the code of a scripted module may be compressed
            raise PretrainedError("It is a compressed archive, but torch.save never compresses.")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise PretrainedError("It was written on a big-endian machine, which is not supported.")
        storages: dict[str, _Storage] = {}

        def load_storage(dtype: np.dtype, key: str, numel: int) -> _Storage:
            if key not in storages:
                # frombuffer raises if the entry is too short.
                data = np.frombuffer(archive.read(f"{root}data/{key}"), dtype, count=numel)
                storages[key] = _Storage(dtype, numel, data)
            return storages[key]

        return RestrictedUnpickler(io.BytesIO(archive.read(names[0])), inert, load_storage).load()


def _load_legacy(file: BinaryIO, inert: Callable[[str], bool]) -> Any:
    storages: dict[str, _Storage] = {}

    def load_storage(dtype: np.dtype, key: str, numel: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, numel))

    def unpickle() -> Any:
        return RestrictedUnpickler(file, inert, load_storage).load()

    if unpickle() != _LEGACY_MAGIC or unpickle() != _LEGACY_PROTOCOL or not unpickle().get("little_endian"):
        raise PretrainedError("It is not in a format of torch.save, or it was written on a big-endian machine.")
    result = unpickle()
    for key in unpickle():
        storage = storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        size = storage.numel * storage.dtype.itemsize
        content = file.read(size)
        if numel != storage.numel or len(content) != size:
            raise PretrainedError("Damaged file: it ends too early.")
        storage.data = np.frombuffer(content, storage.dtype)
    return result


def _resolve(value: Any, done: dict[int, Any]) -> Any:
    """Replaces tensors by arrays and keeps shared and cyclic references."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, _Tensor):
        done[id(value)] = value.array()
    elif isinstance(value, dict):
        done[id(value)] = result = {}
        result.update((key, _resolve(item, done)) for key, item in value.items())
    elif isinstance(value, list):
        done[id(value)] = result = []
        result.extend(_resolve(item, done) for item in value)
    elif isinstance(value, tuple):
        done[id(value)] = tuple(_resolve(item, done) for item in value)
    elif isinstance(value, Record):
        done[id(value)] = value
        value.state = _resolve(value.state, done)
    else:
        return value
    return done[id(value)]


def module_parameters(module: Record) -> dict[str, np.ndarray]:
    """Collects the parameters of a pickled module under the names of its `state_dict()`.

    Args:
      module: the record of a `torch.nn.Module`, as from `load`.

    Raises:
      PretrainedError: the record is not such a module.
    """

    def tables(module: Any) -> tuple[dict, dict] | None:
        if not isinstance(module, Record):
            return None
        if module.qualified_name.startswith(_SCRIPTED):  # parameters, children and other attributes in one table
            return module.state, {name: value for name, value in module.state.items() if isinstance(value, Record)}
        both = module.state.get("_parameters"), module.state.get("_modules")
        return both if all(isinstance(table, dict) for table in both) else None

    def walk(module: Any, prefix: str) -> Iterable[tuple[str, np.ndarray]]:
        found = tables(module)
        if found is None:
            raise PretrainedError(f"'{prefix or 'the root'}' is not a network module.")
        parameters, children = found
        for name, value in parameters.items():
            if isinstance(value, np.ndarray):
                yield prefix + name, value
        for name, child in children.items():
            yield from walk(child, f"{prefix}{name}.")

    return dict(walk(module, ""))
