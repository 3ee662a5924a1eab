"""Reads arrays from files of `torch.save`, without torch and without trusting the file.

A pickle is a program, so unrestricted unpickling runs any code of its author. `pickle_machine` executes it without
Python's unpickler. This reader allows a short list of names: tensors, storages, containers, and the classes of network
modules, which become inert records of their attributes. Any other name raises an error.

The reader supports both containers of `torch.save`, the zip archive (torch ≥ 1.6) and the older sequence of pickles. It
also reads the modules of `torch.jit.save`. Their classes are part of the file and become records too.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from dalle_jax.errors import PretrainedError
from dalle_jax.pretrained.torch_objects import SCRIPTED, PickleReader, Record, Resolver, Storage

# The first numbers of the older container.
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# Bounds that no weights reach. They keep the memory and the time that a hostile file can cost small.
_MAX_MODULES, _MAX_DEPTH = 20_000, 100
_MAX_ENTRIES, _MAX_NAMES = 200_000, 1 << 25  # parameters and children of all modules; characters of their full names
_MAX_EXPANSION, _FREE_BYTES = 2, 1 << 20  # arrays: at most twice the file, because some share a storage, and one MiB


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
            limit = _MAX_EXPANSION * os.path.getsize(path) + _FREE_BYTES
            is_zip = zipfile.is_zipfile(file)
            file.seek(0)
            return Resolver(limit).resolve(_load_zip(file, inert) if is_zip else _load_legacy(file, inert))
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
        order = f"{root}byteorder"
        read = [entry for entry in archive.infolist() if entry.filename.startswith((names[0], order, f"{root}data/"))]
        # The code of a scripted module may be compressed. It is not read.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in read):
            raise PretrainedError("It is a compressed archive, but torch.save never compresses.")
        if order in archive.namelist() and archive.read(order) != b"little":
            raise PretrainedError("It was written on a big-endian machine, which is not supported.")
        storages: dict[str, Storage] = {}
        left = os.fstat(file.fileno()).st_size

        def load_storage(dtype: np.dtype, key: str, numel: int) -> Storage:
            nonlocal left
            if key not in storages:
                content = archive.read(f"{root}data/{key}")
                left -= len(content)
                if left < 0:
                    raise PretrainedError("Its storages are larger than the file, because they overlap.")
                # frombuffer raises if the entry is too short.
                storages[key] = Storage(dtype, numel, np.frombuffer(content, dtype, count=numel))
            return _as_before(storages[key], dtype, numel)

        return PickleReader(inert, load_storage).read(io.BytesIO(archive.read(names[0])))


def _as_before(storage: Storage, dtype: np.dtype, numel: int) -> Storage:
    """Returns a storage, after a check that each reference to it says the same."""
    if (storage.dtype, storage.numel) != (dtype, numel):
        raise PretrainedError(
            f"Damaged file: a storage of {storage.numel} {storage.dtype} is also one of {numel} {dtype}."
        )
    return storage


def _load_legacy(file: BinaryIO, inert: Callable[[str], bool]) -> Any:
    storages: dict[str, Storage] = {}

    def load_storage(dtype: np.dtype, key: str, numel: int) -> Storage:
        return _as_before(storages.setdefault(key, Storage(dtype, numel)), dtype, numel)

    reader = PickleReader(inert, load_storage)
    magic, protocol = reader.read(file, long_integers=True), reader.read(file)
    machine = reader.read(file) if (magic, protocol) == (_LEGACY_MAGIC, _LEGACY_PROTOCOL) else None
    if type(machine) is not dict or machine.get("little_endian") is not True:
        raise PretrainedError("It is not in a format of torch.save, or it was written on a big-endian machine.")
    result = reader.read(file)
    for key in reader.read(file):
        storage = storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        size = storage.numel * storage.dtype.itemsize
        if numel != storage.numel or size > os.fstat(file.fileno()).st_size - file.tell():
            raise PretrainedError("Damaged file: it ends too early.")
        storage.data = np.frombuffer(file.read(size), storage.dtype)
    return result


def module_parameters(module: Record) -> dict[str, np.ndarray]:
    """Collects the parameters of a pickled module under the names of its `state_dict()`.

    Args:
      module: the record of a `torch.nn.Module`, as from `load`.

    Raises:
      PretrainedError: the record is not such a module.
    """

    def tables(module: Any, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        state = module.state if isinstance(module, Record) else None
        if isinstance(state, dict):
            if module.qualified_name.startswith(SCRIPTED):  # parameters, children and others in one table
                return state, {key: value for key, value in state.items() if isinstance(value, Record)}
            both = state.get("_parameters"), state.get("_modules")
            if all(isinstance(table, dict) for table in both):
                return both
        raise PretrainedError(f"'{name[:200] or 'the root'}' is not a network module.")

    found: dict[str, np.ndarray] = {}
    waiting, visited, entries, characters = [("", 0, module)], 0, 0, 0
    while waiting:
        prefix, depth, module = waiting.pop()
        parameters, children = tables(module, prefix)
        visited, entries = visited + 1, entries + len(parameters) + len(children)
        # Modules that contain each other, or that share tables, have more paths than a file has bytes.
        if visited > _MAX_MODULES or depth > _MAX_DEPTH or entries > _MAX_ENTRIES:
            raise PretrainedError(f"Its modules are nested too deeply, or more than {_MAX_MODULES:,}.")
        arrays = [(name, value) for name, value in parameters.items() if isinstance(value, np.ndarray)]
        for name, _ in (*arrays, *children.items()):
            if not isinstance(name, str):
                raise PretrainedError(f"'{prefix[:200]}' has a part whose name is not a text.")
            characters += len(prefix) + len(name)
            if characters > _MAX_NAMES:
                raise PretrainedError("The names of its parameters are longer than those of any weights.")
        found |= {f"{prefix}{name}": value for name, value in arrays}
        waiting += [(f"{prefix}{name}.", depth + 1, child) for name, child in list(children.items())[::-1]]
    return found
