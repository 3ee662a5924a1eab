"""Files of a workdir other than its checkpoints, which make it self-contained for generation.

    <workdir>/config.json                        the configuration
    <workdir>/finished.json                      the end of a training: its last step, its best and last evaluation
    <workdir>/text/sentencepiece.model           the text model
    <workdir>/image_tokenizer/options.json       options of the frozen image tokenizer
    <workdir>/image_tokenizer/params.msgpack     its parameters
    <workdir>/tokens-….npy                       for training only: the image tokens of the training split

Workdirs may be local or remote ("gs://…").
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from dalle_jax.checkpoints import frozen
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.configuration.values import natural
from dalle_jax.data.text import TextModel
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import CheckpointError, ConfigError, UserError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.pytree import PyTree
from dalle_jax.storage.files import access, expanded
from dalle_jax.storage.reachable import check_reachable
from dalle_jax.token_layout import LARGEST_VOCABULARY, LONGEST_STREAM


def _path(workdir: epath.PathLike, *parts: str) -> epath.Path:
    check_reachable(workdir)
    return expanded(workdir).joinpath(*parts)


# -- the configuration and the progress ---------------------------------------------------------------------------


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads the configuration that a training wrote.

    Raises:
      CheckpointError: `workdir` is not the workdir of a training, or the file is damaged.
      ConfigError: its storage cannot be reached.
    """
    path = _path(workdir, "config.json")
    with access(workdir):
        found = path.exists()
    if not found:
        raise CheckpointError(
            f"{workdir} is not the workdir of a training: it has no config.json. Train first "
            "(python -m dalle_jax.main --config=configs/prior.py), or check the path."
        )
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        remedy = "Start the training again: it writes this file at its beginning."
        raise CheckpointError(f"{path} is damaged: {error}. {remedy}") from error


def has_config(workdir: epath.PathLike) -> bool:
    """Returns whether `read_config` finds an intact configuration that is not empty."""
    try:
        return bool(read_config(workdir))
    except UserError:
        return False


def steps_of(workdir: epath.PathLike) -> Sequence[int]:
    """Returns the steps of the checkpoints of the training in `workdir`, ascending; () without one."""
    if not _path(workdir, "checkpoints").exists():
        return ()
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        return checkpoints.steps


def latest_step(workdir: epath.PathLike) -> int | None:
    """Returns the step of the latest checkpoint of the training in `workdir`, or None."""
    return max(steps_of(workdir), default=None)


def is_complete(workdir: epath.PathLike, config: Mapping[str, Any]) -> bool:
    """Returns whether a training in `workdir` has reached `config.steps`, or has stopped early (`config.stop_after`).

    An early stop counts only if the given `stop_after` would stop there as well. A larger one, or 0, trains further.
    """
    latest = latest_step(workdir) or 0
    if latest and latest >= config["steps"]:
        return True
    finished = read_finished(workdir)
    stopped = finished.get("step") == latest > 0
    return stopped and 0 < config.get("stop_after", 0) <= finished.get("without_improvement", 0)


def read_finished(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads `finished.json`, see `training.summary.finished`; {} if it is missing or damaged."""
    path = _path(workdir, "finished.json")
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


# -- the image tokenizer ------------------------------------------------------------------------------------------


def has_tokenizer(workdir: epath.PathLike) -> bool:
    """Returns whether the workdir holds a complete frozen image tokenizer."""
    return frozen.exists(_path(workdir, "image_tokenizer"))


def save_tokenizer(workdir: epath.PathLike, tokenizer: ImageTokenizer, params: PyTree) -> None:
    """Freezes an image tokenizer into `workdir`."""
    frozen.save(_path(workdir, "image_tokenizer"), tokenizers.to_dict(tokenizer), params)


def load_tokenizer(workdir: epath.PathLike) -> tuple[ImageTokenizer, PyTree]:
    """Loads the image tokenizer of a workdir: a prior's frozen one, or the one that a dVAE training trained.

    A training that keeps its best checkpoint (`config.keep.best`) gives the best one, any other one the latest.

    Raises:
      CheckpointError: there is neither, or it is damaged.
    """
    if has_tokenizer(workdir):
        folder = _path(workdir, "image_tokenizer")
        options, params = frozen.load(folder, "Delete it: the training then freezes its tokenizer there again.")
        return tokenizers.from_dict(options), params
    config = read_config(workdir)
    if config.get("task") not in tokenizers.TASKS:
        expected = " or ".join(repr(task) for task in tokenizers.TASKS)
        raise CheckpointError(
            f"{workdir} holds no image tokenizer: its task is {config.get('task')!r}, not {expected}."
        )
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        return tokenizers.of_training(config), checkpoints.restore_params(tokenizer_step(workdir))


def tokenizer_step(workdir: epath.PathLike) -> int | None:
    """Returns the step of the checkpoint that `load_tokenizer` reads from a training, or None without a checkpoint."""
    best = read_finished(workdir).get("best") or {}
    if read_config(workdir).get("keep", {}).get("best", 0) > 0 and best.get("step") in steps_of(workdir):
        return best["step"]
    return latest_step(workdir)


# -- the text model -----------------------------------------------------------------------------------------------


def text_model_path(workdir: epath.PathLike) -> epath.Path:
    """Returns the path of the workdir's text model."""
    return _path(workdir, "text", "sentencepiece.model")


def check_text_section(section: ConfigDict) -> None:
    """Checks the sizes of `config.text`; raises a `ConfigError`."""
    natural("config.text.vocab_size", section["vocab_size"], 1, LARGEST_VOCABULARY)
    natural("config.text.length", section["length"], 1, LONGEST_STREAM)


def ensure_text_model(section: ConfigDict, captions: Iterable[str], workdir: epath.PathLike) -> TextModel:
    """Loads the workdir's text model, after copying it from `section.path` or training it if it does not exist yet.

    Args:
      section: {"vocab_size", "length", "path"}.
      captions: of the training split. They are read only to train the model.
      workdir: directory of the run.

    Raises:
      ConfigError: the model has a larger vocabulary than the section, or a size is below one.
    """
    check_text_section(section)
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
    """Loads the text model of a prior's workdir.

    Raises:
      DataError: it is missing or damaged.
    """
    return TextModel.load(text_model_path(workdir))
