"""Exported folders: a trained model as safetensors and JSON, without its training state.

    export.json                   kind, step and dtype, with the SHA-256 of the other files; written last
    config.json                   the configuration of the training, without local paths; None for an imported module
    model.safetensors             parameters of a prior, or model-00001-of-00002.safetensors and so on; or of adapters
    image_tokenizer/, text/       as in a workdir; parameters are model.safetensors
    clip/                         a CLIP, see `ClipScorer`
    low_resolution/               the image tokenizer of smaller images, of a prior that enlarges them
    README.md                     the model card, which may be edited

If export.json exists, the export is complete. Folders may be local or remote ("gs://…"). They may come from strangers.
Nothing in them is executed, and sizes and checksums are compared before a file is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from dalle_jax.checkpoints import frozen as modules
from dalle_jax.errors import CheckpointError, ConfigError, DamagedError, UserError
from dalle_jax.pytree import PyTree, by_path, nested
from dalle_jax.storage import json_files, tensor_file
from dalle_jax.storage.checksummed import checksum
from dalle_jax.storage.errors import storage_cause
from dalle_jax.storage.files import expanded, write_atomically, write_errors, write_json
from dalle_jax.storage.reachable import check_reachable

NAME, FORMAT = "export.json", 1
PRIOR, TOKENIZER, CLIP, ADAPTERS = KINDS = ("prior", "image_tokenizer", "clip", "adapters")
_FIELDS = {"format": int, "kind": str, "dtype": str, "step": (int, type(None)), "frozen": (str, type(None)),
           "base": (dict, type(None)), "files": dict}  # fmt: skip
_FILE = re.compile(r"(?:[A-Za-z0-9_][\w.-]{0,99}/)?[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
_SHARD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_FOLDERS = ("image_tokenizer", "text", "clip", "low_resolution")
_UNFINISHED = "unfinished-export.txt"
_MOST_FILES, _LARGEST_JSON = 10_000, 16 << 20  # bytes
_SHARD_BYTES = 4 << 30
REMEDY = "Export it again, or download it again."


def exists(folder: epath.PathLike) -> bool:
    """Returns whether the folder holds a complete export."""
    check_reachable(folder)
    return (expanded(folder) / NAME).exists()


# -- writing ------------------------------------------------------------------------------------------------------


def begin(folder: epath.PathLike) -> None:
    """Creates the folder, or removes the files of an earlier export from it, finished or not.

    Raises:
      ConfigError: the folder holds something else, such as a training.
      UserError: a file cannot be written or removed.
    """
    folder = expanded(folder)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        ours = exists(folder) or (folder / _UNFINISHED).exists()
        if not ours and any(True for _ in folder.iterdir()):
            raise ConfigError(f"--output={folder} is not empty, and it is no export: give a new folder.")
        write_atomically(folder / _UNFINISHED, b"An export into this folder has begun and is not finished.\n")
        (folder / NAME).unlink(missing_ok=True)
        for name in _names(folder):
            (folder / name).unlink()


def _names(folder: epath.Path) -> list[str]:
    """Returns the names of the files of an export that are in a folder, except export.json and the model card."""
    found = [path for path in folder.iterdir() if path.name == "config.json" or _SHARD.fullmatch(path.name)]
    inner = [folder / name for name in _FOLDERS if (folder / name).is_dir()]
    found += [path for place in inner for path in place.iterdir() if not path.is_dir()]
    names = (path.relative_to(folder).as_posix() for path in found)
    return sorted(name for name in names if _FILE.fullmatch(name))


def rounded(params: PyTree, dtype: str, compact: bool = False) -> PyTree:
    """Rounds the kernels of layers to a dtype, on the host. Gains, biases and embeddings stay float32.

    A model that computes in bfloat16 rounds its kernels wherever it multiplies with them, so it gives the same result.

    Args:
      params: nested dict of float32 arrays.
      dtype: "float32" or "bfloat16".
      compact: round embeddings too: every array of at least two axes. `Exported` and `frozen.load` return float32 for
        them.
    """

    def stored(path: Any, x: jax.Array) -> np.ndarray:
        array = np.asarray(jax.device_get(x))
        kernel = jax.tree_util.keystr(path[-1:], simple=True) == "kernel"
        smaller = dtype == "bfloat16" and (kernel or (compact and array.ndim > 1))
        return array.astype(jnp.bfloat16) if smaller else array

    return jax.tree_util.tree_map_with_path(stored, params)


def _read_back(path: str, array: np.ndarray) -> np.ndarray:
    """Returns float32 for what a compact export rounded in addition to kernels."""
    kernel = path.rpartition("/")[-1] == "kernel"
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 and not kernel else array


def write_params(folder: epath.PathLike, params: PyTree, shard_bytes: int = _SHARD_BYTES) -> None:
    """Writes the parameters as one safetensors file, or as several if they are larger than `shard_bytes`."""
    shards, size = [{}], 0
    for path, array in by_path(params).items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][path] = array
        size += array.nbytes
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with write_errors(expanded(folder) / name):
            write_atomically(expanded(folder) / name, tensor_file.encode(shard, {"format": "flax"}))


def finish(folder: epath.PathLike, description: Mapping[str, Any]) -> None:
    """Writes export.json, with the size and the checksum of each file of the export.

    Args:
      folder: all other files are there.
      description: the fields of export.json except "format", "files" and "checksum".

    Raises:
      UserError: a file cannot be read or written.
    """
    folder, files = expanded(folder), {}
    with write_errors(folder):
        for name in _names(folder):
            content = (folder / name).read_bytes()
            files[name] = {"bytes": len(content), "sha256": checksum(content)}
    content = {"format": FORMAT, **description, "files": files}
    write_json(folder / NAME, {**content, "checksum": _sum(content)})
    with write_errors(folder):
        (folder / _UNFINISHED).unlink(missing_ok=True)


# -- reading ------------------------------------------------------------------------------------------------------


class Exported:
    """A complete exported folder. It can be read as a run with a single checkpoint, see `Checkpoints`.

    Attributes:
      folder: where it is.
      kind: one of `KINDS`.
      dtype: "float32" or "bfloat16", see `rounded`.
      step: step of the exported checkpoint, or None for an imported model.
      base: of adapters: the "name" and the "fingerprint" of the run that they belong to.
      files: size and checksum of each file by name.
    """

    def __init__(self, folder: epath.PathLike):
        """Reads export.json.

        Raises:
          DamagedError: it is missing or damaged.
          CheckpointError: a later version of dalle_jax wrote it.
        """
        self.folder = expanded(folder)
        found = parse(json_files.read(self.folder / NAME, dict, DamagedError, REMEDY), str(self.folder / NAME))
        self.kind, self.dtype, self.step, self._frozen = (found[key] for key in ("kind", "dtype", "step", "frozen"))
        self.files, self.base = found["files"], found["base"]

    @property
    def steps(self) -> list[int]:
        """The one step that can be read, or none for an imported model."""
        return [] if self.step is None else [self.step]

    def resolve(self, step: int | str | None) -> int:
        """See `Checkpoints.resolve`."""
        if step not in (None, "best") and int(step) != self.step:
            raise CheckpointError(f"{self.folder} is an export of step {self.step}: it holds no step {step}.")
        return self.step or 0

    def config(self, step: int | str | None = None) -> dict[str, Any]:
        """See `Checkpoints.config`."""
        self.resolve(step)
        with self._damage("config.json"):
            return json_files.parse(self._read("config.json"))

    def check_files(self) -> None:
        """Compares the small files with their checksums: all except the parameters.

        Raises:
          DamagedError: a file is missing or changed.
        """
        for name in self.files:
            if not name.endswith(".safetensors"):
                with self._damage(name):
                    self._read(name)

    def restore_params(
        self,
        step: int | str | None = None,
        *,
        ema: bool = True,
        layout: Callable[[PyTree], PyTree] | None = None,
        frozen: str | None = None,
    ) -> PyTree:
        """See `Checkpoints.restore_params`. Kernels are bfloat16 if they were exported so."""
        del ema  # the average was exported, if the training kept one
        self.resolve(step)
        if self._frozen and frozen and self._frozen != frozen:
            raise CheckpointError(
                f"{self.folder} was exported with another image tokenizer than the one in image_tokenizer/. {REMEDY}"
            )
        if self.kind in (TOKENIZER, CLIP):
            params = modules.load(self.folder / self.kind, REMEDY)[1]
        else:
            params = self._arrays()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        first_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = layout(shapes) if layout else jax.tree.map(lambda _: first_device, shapes)
        return jax.tree.map(jax.device_put, params, shardings)

    def _arrays(self) -> dict[str, Any]:
        """Reads the arrays of all shards as nested dicts."""
        shards = sorted(name for name in self.files if _SHARD.fullmatch(name))
        if not shards:
            raise DamagedError(f"{self.folder} lists no model.safetensors. {REMEDY}")
        arrays: dict[str, np.ndarray] = {}
        for name in shards:
            with self._damage(name):
                found = tensor_file.decode(self._read(name))
                if twice := arrays.keys() & found.keys():
                    raise ValueError(f"{min(twice)[:200]!r} stands in two files")
                arrays.update({path: _read_back(path, array) for path, array in found.items()})
        with self._damage(shards[0]):
            return nested(arrays)

    def _read(self, name: str) -> bytes:
        """Returns the content of a file after a comparison of its size and its checksum."""
        path, expected = self.folder / name, self.files.get(name)
        if expected is None:
            raise ValueError(f"{NAME} does not list it")
        if path.is_dir() or not path.exists():
            raise ValueError("it is missing")
        if (size := path.stat().length) != expected["bytes"]:
            raise ValueError(f"it has {size:,} bytes, and {expected['bytes']:,} were exported")
        content = path.read_bytes()
        if checksum(content) != expected["sha256"]:
            raise ValueError(f"its SHA-256 is not {expected['sha256']}, that of the export")
        return content

    @contextmanager
    def _damage(self, name: str) -> Iterator[None]:
        """Converts errors inside the block into one that names a file."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except Exception as error:  # a hostile file can make the readers fail in any way
            if (cause := storage_cause(error)) is not None:
                raise CheckpointError(f"Cannot read {self.folder / name}: {cause}.") from error
            raise DamagedError(f"{self.folder / name} is damaged: {error}. {REMEDY}") from error

    def close(self) -> None:
        """Does nothing; see `Checkpoints.close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def parse(found: dict[str, Any], where: str) -> dict[str, Any]:
    """Checks the content of an export.json.

    Args:
      found: its JSON values.
      where: the file, for messages.

    Returns:
      The same values.

    Raises:
      DamagedError: it was changed, a field is missing or has another type, or a file has a name that leads elsewhere.
      CheckpointError: a later version of dalle_jax wrote it.
    """
    number = found.get("format")
    if type(number) is int and number > FORMAT:
        raise CheckpointError(f"{where} has format {number}, and this version reads up to {FORMAT}: update dalle_jax.")
    content = {key: value for key, value in found.items() if key != "checksum"}
    wrong = [
        key for key, kind in _FIELDS.items()
        if key not in found or isinstance(found[key], bool) or not isinstance(found[key], kind)
    ]  # fmt: skip
    if wrong:
        raise DamagedError(f"{where} is damaged: {wrong[0]} is missing or of another type. {REMEDY}")
    if found.get("checksum") != _sum(content):
        raise DamagedError(f"{where} changed since it was written. {REMEDY}")
    if found["kind"] not in KINDS or len(found["files"]) > _MOST_FILES:
        raise DamagedError(f"{where}: kind {str(found['kind'])[:50]!r}; expected one of {', '.join(KINDS)}. {REMEDY}")
    for name, entry in found["files"].items():
        sizes = entry.get("bytes") if isinstance(entry, dict) else None
        if not _FILE.fullmatch(name) or type(sizes) is not int or not isinstance(entry.get("sha256"), str):
            raise DamagedError(f"{where} lists the file {name[:100]!r}, which is no file of an export. {REMEDY}")
        if name.endswith(".json") and sizes > _LARGEST_JSON:
            raise DamagedError(f"{where}: {name} has {sizes:,} bytes, more than any export. {REMEDY}")
    return found


def _sum(content: Mapping[str, Any]) -> str:
    return checksum(json.dumps(content, sort_keys=True).encode())
