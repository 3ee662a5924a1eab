"""Prepares TFDS data sets: writes their files once, or finds those that an earlier command wrote.

A copy of a user's files is distinguished by what it was made from, so that changed files are copied again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import time
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from dalle_jax.configuration.options import closest
from dalle_jax.data.builders.coco_captions_local import coco_captions_local_dataset_builder as coco
from dalle_jax.data.builders.configured import ConfiguredBuilder
from dalle_jax.data.builders.cub_captions import cub_captions_dataset_builder as cub
from dalle_jax.data.builders.emoji_captions import Builder as EmojiBuilder
from dalle_jax.data.builders.shapes_captions import Builder as ShapesBuilder
from dalle_jax.data.builders.turn import only_one_prepares
from dalle_jax.data.sources.once import once
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import ConfigError, DataError, UserError
from dalle_jax.storage import json_files
from dalle_jax.storage.files import expanded

COCO = "coco_captions"
_COCO_LOCAL = "coco_captions_local"
_COCO_CONFIG = "2014"  # the only one that TFDS's coco_captions has
_BUILDERS: dict[str, type[ConfiguredBuilder]] = {
    "shapes_captions": ShapesBuilder,
    "emoji_captions": EmojiBuilder,
    "cub_captions": cub.Builder,
    _COCO_LOCAL: coco.Builder,
}
# Of the user's local copies: what they are made from, and the argument that selects the part of the name before that.
_MADE_FROM: dict[str, Callable[..., str]] = {_COCO_LOCAL: coco.made_from, "cub_captions": cub.made_from}
_FROM_OTHER_KEYS = ("made_from",)  # not from builder_kwargs
_KNOWN = (NotImplementedError, OSError, ImportError, AssertionError, TypeError, ValueError)  # `tfds.py` explains them
_PATH = "prepared_from"  # in the metadata of a copy


def prepare(options: DataOptions, data_dir: str) -> tfds.core.DatasetBuilder:
    """Returns the builder of the data set that the options name, after preparing its files.

    Args:
      options: what to read.
      data_dir: TFDS's directory of prepared data sets.

    Raises:
      ConfigError: if `builder_kwargs` holds a key that the builder does not know.
      DataError: if the user's files are missing or malformed.
    """
    source, path = options.source, options.path and str(expanded(options.path))
    if source == COCO:
        if (prepared := _prepared_coco(data_dir)) is not None:
            if path:
                logging.info("data.path is ignored: TFDS's coco_captions is prepared in %s", prepared.data_path)
            return prepared
        source = _COCO_LOCAL
    make = _maker(options, source, path, data_dir)
    with _damage_named(epath.Path(data_dir) / source):
        builder = make()
    if _is_prepared(builder):
        if source in _MADE_FROM:
            once(("reuse", str(builder.data_path)), lambda: _log_reuse(builder))
        return builder
    with only_one_prepares(builder.data_path, options.source):
        builder = make()  # another process may have prepared it in the meantime
        if not _is_prepared(builder):
            _write(builder, options.source, path)
    return builder


@contextlib.contextmanager
def _damage_named(folder: epath.Path) -> Iterator[None]:
    """Explains an error of TFDS by the damaged file of a prepared data set, if there is one.

    Args:
      folder: of all versions of the data set.
    """
    try:
        yield
    except Exception as error:  # TFDS and protobuf raise many types on damaged files
        for path in sorted(folder.glob("*/*/*.json")) + sorted(folder.glob("*/*.json")) if folder.exists() else ():
            json_files.read(path, dict, DataError, f"Delete {path.parent}: the data set is then prepared again.")
        if isinstance(error, (*_KNOWN, UserError)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(
            f"The prepared data set in {folder} cannot be opened ({reason}). Delete the folder: the data set is then "
            "prepared again."
        ) from error


def _maker(
    options: DataOptions, source: str, path: str | None, data_dir: str
) -> Callable[[], tfds.core.DatasetBuilder]:
    """Returns the builder's constructor with its arguments."""
    arguments = dict(options.builder_kwargs)
    if source not in _BUILDERS:
        return functools.partial(tfds.builder, source, data_dir=data_dir, file_format="array_record", **arguments)
    kind = _BUILDERS[source]
    fields = {field.name for field in dataclasses.fields(kind.CONFIG) if field.init}
    known = sorted(fields - {field.name for field in dataclasses.fields(tfds.core.BuilderConfig)})
    known = [name for name in known if name not in _FROM_OTHER_KEYS]
    if unknown := [name for name in arguments if name not in known]:
        expected = f"It has: {', '.join(known)}" if known else "It has none"
        raise ConfigError(
            f"config.data.builder_kwargs holds {', '.join(unknown)}, which data.source={options.source} does not have"
            f"{closest(unknown[0], known)}. {expected}. To remove them, give --config.data.builder_kwargs='{{}}'."
        )
    if source in _MADE_FROM:
        arguments["made_from"] = _made_from(source, path, data_dir, arguments)
    return functools.partial(kind, data_dir=data_dir, file_format="array_record", **arguments)


def _made_from(source: str, path: str | None, data_dir: str, arguments: dict) -> str:
    """Returns the fingerprint of the local copy, or of the newest prepared one if the local copy is gone."""
    if path and epath.Path(path).is_dir():
        return _MADE_FROM[source](epath.Path(path), **arguments)
    kind = _BUILDERS[source]
    base, folder = kind.CONFIG(**arguments).name, epath.Path(data_dir) / kind.name
    found = list(folder.glob(f"{base}*/{kind.VERSION}/dataset_info.json")) if folder.exists() else []
    if not found:
        return ""
    newest = max(found, key=lambda file: file.stat().mtime)
    return newest.parent.parent.name.removeprefix(base).removeprefix("_")


def _is_prepared(builder: tfds.core.DatasetBuilder) -> bool:
    return (epath.Path(builder.data_path) / "dataset_info.json").exists()


def _log_reuse(builder: tfds.core.DatasetBuilder) -> None:
    place = epath.Path(builder.data_path)
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime((place / "dataset_info.json").stat().mtime))
    origin = (builder.info.metadata or {}).get(_PATH) or "an unknown folder"
    logging.info(
        "%s: using the copy prepared on %s in %s from %s; delete %s to make it again.",
        builder.name, when, place, origin, place,
    )  # fmt: skip


def _write(builder: tfds.core.DatasetBuilder, source: str, path: str | None) -> None:
    """Writes the data set. TFDS prints in bold and draws progress bars, which are no use in a log."""
    logging.info("Preparing the data set %s in %s.", source, builder.data_path)
    if builder.name in _MADE_FROM:
        builder.info.metadata[_PATH] = path
    tfds.disable_progress_bar()
    # TFDS would first look in its public bucket, over the network, which holds no data in this format.
    download = tfds.download.DownloadConfig(manual_dir=path, try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare(download_config=download)


def _prepared_coco(data_dir: str) -> tfds.core.DatasetBuilder | None:
    """Returns TFDS's own coco_captions from its files, if they exist in a format with random access."""
    folder = epath.Path(data_dir) / COCO / _COCO_CONFIG
    versions = folder.glob("*/dataset_info.json") if folder.exists() else []
    found = [tfds.builder_from_directory(version.parent) for version in sorted(versions)]
    readable = [builder for builder in found if builder.info.file_format.value == "array_record"]
    for builder in found:
        if builder not in readable:
            logging.warning(
                "coco_captions in %s is ignored: its format is %s; expected array_record (run tfds build with "
                "--file_format=array_record).", builder.data_path, builder.info.file_format.value,
            )  # fmt: skip
    return readable[-1] if readable else None
