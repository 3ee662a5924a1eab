"""What a prior's workdir holds beside its checkpoints, so that the directory is all that generation needs.

    <workdir>/config.json                        the configuration
    <workdir>/text/sentencepiece.model           the text model
    <workdir>/image_tokenizer/options.json       the frozen image tokenizer: what it is,
    <workdir>/image_tokenizer/params.msgpack     and its parameters
    <workdir>/tokens-….npy                       for training alone: the split's tokens, where they are made once

Directories may be local or remote ("gs://…").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from dalle_jax.checkpoints import frozen
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.data.text import TextModel
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import CheckpointError, ConfigError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.pytree import PyTree
from dalle_jax.storage.files import access, expanded


def _path(workdir: epath.PathLike, *parts: str) -> epath.Path:
    return expanded(workdir).joinpath(*parts)


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """The configuration that a training wrote.

    Raises:
      CheckpointError: where `workdir` is not the directory of a training, or the file is damaged.
      ConfigError: where its storage cannot be reached.
    """
    path = _path(workdir, "config.json")
    with access(workdir):
        there = path.exists()
    if not there:
        raise CheckpointError(
            f"{workdir} is not the workdir of a training: it has no config.json. Train first "
            "(python -m dalle_jax.main --config=configs/prior.py), or check the path."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        remedy = "Start the training again: it writes this file when it begins."
        raise CheckpointError(f"{path} is damaged: {error}. {remedy}") from error


# -- the image tokenizer ------------------------------------------------------------------------------------------


def has_tokenizer(workdir: epath.PathLike) -> bool:
    """Whether a frozen image tokenizer is there, whole."""
    return frozen.is_there(_path(workdir, "image_tokenizer"))


def save_tokenizer(workdir: epath.PathLike, tokenizer: ImageTokenizer, params: PyTree) -> None:
    """Freezes an image tokenizer into `workdir`."""
    frozen.save(_path(workdir, "image_tokenizer"), tokenizers.to_dict(tokenizer), params)


def load_tokenizer(workdir: epath.PathLike) -> tuple[ImageTokenizer, PyTree]:
    """The image tokenizer of a workdir: the frozen one of a prior, or the one that a dVAE training made.

    Raises:
      CheckpointError: where there is neither, or it is damaged.
    """
    if has_tokenizer(workdir):
        folder = _path(workdir, "image_tokenizer")
        options, params = frozen.load(folder, "Delete it: the training freezes its tokenizer there again.")
        return tokenizers.from_dict(options), params
    config = read_config(workdir)
    if config.get("task") != "dvae":
        raise CheckpointError(f"{workdir} holds no image tokenizer: its task is {config.get('task')!r}, not 'dvae'.")
    checkpoints = Checkpoints(str(workdir), read_only=True)
    try:
        return tokenizers.from_config(config), checkpoints.restore_params()
    finally:
        checkpoints.close()


# -- the text model -----------------------------------------------------------------------------------------------


def text_model_path(workdir: epath.PathLike) -> epath.Path:
    return _path(workdir, "text", "sentencepiece.model")


def ensure_text_model(section: ConfigDict, captions: Iterable[str], workdir: epath.PathLike) -> TextModel:
    """The workdir's text model; copied from `section.path`, or trained on the captions, where it has none yet.

    Args:
      section: {"vocab_size", "length", "path"}.
      captions: of the training split; read only where a model is trained.

    Raises:
      ConfigError: where the model has another vocabulary than a model that is already there, or a size is below one.
    """
    for name in ("vocab_size", "length"):
        if section[name] < 1:
            raise ConfigError(f"config.text.{name} is {section[name]}; expected at least 1.")
    path = text_model_path(workdir)
    with first_host_first(f"the text model {path}"):
        if not path.exists():
            if section.path:
                TextModel.load(section.path).save(path)
            else:
                logging.info("Training the text model (%s)", path)
                TextModel.train(captions, section.vocab_size, path)
    model = TextModel.load(path)
    if model.vocab_size > section.vocab_size:
        raise ConfigError(
            f"The text model {path} has {model.vocab_size} ids but config.text.vocab_size is {section.vocab_size}: "
            f"set config.text.vocab_size={model.vocab_size}, or start in another workdir."
        )
    return model


def load_text_model(workdir: epath.PathLike) -> TextModel:
    """The text model of a prior's workdir (DataError where it is missing or damaged)."""
    return TextModel.load(text_model_path(workdir))


def is_complete(workdir: epath.PathLike, config: Mapping[str, Any]) -> bool:
    """Whether a training in `workdir` has reached `config.steps`."""
    if not _path(workdir, "checkpoints").exists():
        return False
    checkpoints = Checkpoints(str(workdir), read_only=True)
    try:
        return (checkpoints.latest_step or 0) >= config["steps"]
    finally:
        checkpoints.close()
