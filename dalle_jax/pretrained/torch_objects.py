"""The objects in a pickle of `torch.save`: tensors, storages, containers and inert records of modules.

`PickleReader` maps the names in a file to them, and rejects every other name. `Resolver` replaces tensors by arrays.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from dalle_jax.errors import PretrainedError
from dalle_jax.pretrained.pickle_machine import Machine, plain_key

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
# Prefix of the classes that a file of `torch.jit.save` defines itself.
SCRIPTED = "__torch__."
# Bounds that no weights reach. They keep the memory and the time that a hostile file can cost small.
_MAX_AXES = 16  # of a tensor
_MAX_COPIED = 1_000_000  # elements
# Functions of `torch.jit.save` that mark the type of a container.
_TYPE_MARKS = {
    f"torch.jit._pickle.{name}"
    for name in ("restore_type_tag", "build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")
}


class Record:
    """Stands for an object of the file and holds only the name of its class and its attributes.

    Attributes:
      qualified_name: "module.Class" as in the file.
      arguments: what its class was called with.
      state: attributes from the file, a dictionary, or a tuple for some classes.
    """

    __slots__ = ("arguments", "qualified_name", "state")

    def __init__(self, qualified_name: str, arguments: tuple[Any, ...]):
        self.qualified_name, self.arguments, self.state = qualified_name, arguments, None


class _Class:
    """A class of the file, whose objects become `Record`s."""

    __slots__ = ("qualified_name",)

    def __init__(self, qualified_name: str):
        self.qualified_name = qualified_name


class _StorageType:
    """The class of a storage."""

    __slots__ = ("dtype",)

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype


class Storage:
    """A flat array. In the older container its content follows the objects that refer to it."""

    __slots__ = ("data", "dtype", "numel")

    def __init__(self, dtype: np.dtype, numel: int, data: np.ndarray | None = None):
        self.dtype, self.numel, self.data = dtype, numel, data


class _Tensor:
    """A view of a storage, which becomes an array after all storages are read."""

    __slots__ = ("offset", "size", "storage", "stride")

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]):
        if type(storage) is not Storage:
            raise pickle.UnpicklingError("a tensor without a storage")
        for numbers in (size, stride):
            if type(numbers) is not tuple or len(numbers) > _MAX_AXES:
                raise pickle.UnpicklingError(f"a tensor whose size or strides are not a tuple of at most {_MAX_AXES}")
        if any(type(n) is not int for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError("a tensor whose size, strides or offset are not integers")
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride

    def array(self) -> np.ndarray:
        """Returns the elements as an array in C order."""
        if len(self.size) != len(self.stride) or min((self.offset, *self.size, *self.stride)) < 0:
            raise PretrainedError(f"Damaged file: a tensor of size {self.size} and strides {self.stride}.")
        storage, count = self.storage, math.prod(self.size)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        present = 0 if storage.data is None else len(storage.data)
        if count > present or (count and last >= present):
            raise PretrainedError(
                f"Damaged file: a tensor of size {self.size} reaches beyond its storage of {present} numbers."
            )
        if not count:
            return np.zeros(self.size, storage.dtype)
        strides = tuple(step * storage.dtype.itemsize for step in self.stride)
        return np.lib.stride_tricks.as_strided(storage.data[self.offset :], self.size, strides).copy()


def _rebuild_parameter(data: Any, *rest: Any) -> _Tensor:
    del rest  # requires_grad, hooks
    if type(data) is not _Tensor:
        raise pickle.UnpicklingError("a parameter that is not a tensor")
    return data


class _Functions:
    """The functions that a file may call. They copy at most `_MAX_COPIED` elements in all."""

    def __init__(self):
        self._copied = 0
        self.by_name: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": self._dict,
            "builtins.set": self._set,
            "__builtin__.set": self._set,
            "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *rest: _Tensor(
                storage, offset, size, stride
            ),
            "torch._utils._rebuild_parameter": _rebuild_parameter,
            **dict.fromkeys(_TYPE_MARKS, lambda value, *mark: value),
        }

    def _count(self, values: Any) -> list[Any]:
        if type(values) not in (list, tuple):
            raise pickle.UnpicklingError("expected a list")
        self._copied += len(values)
        if self._copied > _MAX_COPIED:
            raise PretrainedError(f"The pickle copies more than {_MAX_COPIED:,} elements, which no weights need.")
        return list(values)

    def _set(self, values: Any = ()) -> set[Any]:
        return set(map(plain_key, self._count(values)))

    def _dict(self, pairs: Any = ()) -> dict[Any, Any]:
        pairs = self._count(pairs)
        if any(type(pair) not in (list, tuple) or len(pair) != 2 for pair in pairs):
            raise pickle.UnpicklingError("expected pairs of keys and values")
        return {plain_key(key): value for key, value in pairs}


class PickleReader:
    """Reads the pickles of one file: tensors, containers and inert records. It rejects every other name.

    Args:
      inert: returns whether an unlisted class "module.Class" may become a `Record`.
      load_storage: maps (dtype, key, number of elements) to a storage.
    """

    def __init__(self, inert: Callable[[str], bool], load_storage: Callable[[np.dtype, str, int], Storage]):
        self._inert, self._load_storage = inert, load_storage
        self._functions = _Functions().by_name

    def read(self, file: BinaryIO, long_integers: bool = False) -> Any:
        """Reads one pickle; see `Machine.run`."""
        machine = Machine(
            name=self._named, call=self._call, set_state=self._set_state, persistent=self._persistent,
            key=self._key, drop_content=self._drop_content, long_integers=long_integers,
        )  # fmt: skip
        return machine.run(file)

    def _named(self, asked: str) -> Any:
        module, _, name = asked.rpartition(".")
        if asked in self._functions:
            return self._functions[asked]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _StorageType(_DTYPES[name])
        if asked == "torch.device" or asked.startswith(SCRIPTED) or self._inert(asked):
            return _Class(asked)
        raise PretrainedError(
            f"The file asks for {asked[:200]!r}, which weights do not need. It was rejected, no code was run. If you "
            "trust its origin, convert it to safetensors on the machine that wrote it."
        )

    def _call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if type(function) is _Class:
            return Record(function.qualified_name, arguments)
        if not any(function is allowed for allowed in self._functions.values()):
            raise pickle.UnpicklingError(f"a call of a {type(function).__name__}")
        return function(*arguments)

    def _set_state(self, value: Any, state: Any) -> None:
        if type(value) is dict:
            return  # `_metadata` of a state dict, which nothing here reads
        if type(value) is not Record or type(state) not in (dict, tuple) or value.state is not None:
            raise pickle.UnpicklingError(f"a state for a {type(value).__name__}")
        value.state = state

    def _key(self, key: Any) -> Any:
        """Returns the key of a dictionary. Trainings store the states of their callbacks by class."""
        return key.qualified_name if type(key) is _Class else plain_key(key)

    def _drop_content(self, value: Any) -> None:
        """Lets the items of a record go, whose class may be a kind of list or dictionary. Nothing reads them."""
        if type(value) is not Record:
            raise pickle.UnpicklingError(f"items for a {type(value).__name__}")

    def _persistent(self, pid: Any) -> Any:
        """Returns a storage, or in the older container a module class, whose source text is dropped."""
        if type(pid) is tuple and len(pid) >= 2 and type(pid[0]) is str:
            if pid[0] == "module" and type(pid[1]) is _Class:
                return pid[1]
            if pid[0] == "storage" and len(pid) >= 5 and type(pid[1]) is _StorageType and type(pid[2]) in (str, int):
                _, storage_type, key, _, numel, *view = pid
                if type(numel) is not int or numel < 0:
                    raise pickle.UnpicklingError("a storage whose size is not a count")
                if any(part is not None for part in view):
                    raise pickle.UnpicklingError("a view of another storage, which torch no longer writes")
                return self._load_storage(storage_type.dtype, str(key), numel)
        raise pickle.UnpicklingError("an unknown reference")


class Resolver:
    """Replaces tensors by arrays and keeps shared and cyclic references.

    Args:
      limit: bytes of all arrays together. Views of one storage become arrays, so a small file could fill the memory.
    """

    def __init__(self, limit: int):
        self._left, self._done, self._tuples = limit, {}, set()
        self._kept: list[Any] = []  # so that no `id` is given twice

    def resolve(self, value: Any) -> Any:
        """Returns the value with arrays in place of tensors."""
        if id(value) in self._done:
            return self._done[id(value)]
        self._kept.append(value)
        if type(value) is _Tensor:
            result = self._done[id(value)] = value.array()
            self._left -= result.nbytes
            if self._left < 0:
                raise PretrainedError("Its tensors are many times larger than the file, because they share storages.")
        elif type(value) is dict:
            result = self._done[id(value)] = {}
            result.update((key, self.resolve(item)) for key, item in value.items())
        elif type(value) is list:
            result = self._done[id(value)] = []
            result.extend(self.resolve(item) for item in value)
        elif type(value) is tuple:
            if id(value) in self._tuples:
                raise PretrainedError("A tuple of the pickle contains itself, which weights do not need.")
            self._tuples.add(id(value))
            result = self._done[id(value)] = tuple(self.resolve(item) for item in value)
        elif type(value) is Record:
            result = self._done[id(value)] = value
            value.arguments, value.state = self.resolve(value.arguments), self.resolve(value.state)
        else:
            return value
        return result
