"""Files of a workdir other than its checkpoints, which make it self-contained for generation.

    <workdir>/config.json, config.json.sha256    the configuration, and its checksum
    <workdir>/finished.json                      the end of a training: its last step, its best and last evaluation
    <workdir>/text/sentencepiece.model           the text model, or another kind of one (`data.text_models`)
    <workdir>/image_tokenizer/options.json       options of the frozen image tokenizer
    <workdir>/image_tokenizer/params.msgpack     its parameters
    <workdir>/tokens-…/                          for training only: the image tokens of the training split

Workdirs may be local or remote ("gs://…").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from dalle_jax.checkpoints import checksums, exported, frozen
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.compatibility import to_json
from dalle_jax.checkpoints.exported import Exported
from dalle_jax.configuration.values import natural
from dalle_jax.data import text_models
from dalle_jax.data.text import CaptionModel, TextModel
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import CheckpointError, ConfigError, DamagedError, UserError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.pytree import PyTree
from dalle_jax.storage import checksummed, json_files
from dalle_jax.storage.files import access, expanded
from dalle_jax.storage.reachable import check_reachable
from dalle_jax.token_layout import LARGEST_VOCABULARY, LONGEST_STREAM

# Keys of config.json in every version, with their kinds. Those with a question mark may be absent.
_SECTIONS: dict[str, Any] = {
    "task": str,
    "data": {"image_size": int},
    "model": {},
    "text?": {"length": int},
    "prior?": str,
    "keep?": {},
    "tokenizer?": {"data": {"image_size": int}, "model": {}},
}


def _path(workdir: epath.PathLike, *parts: str) -> epath.Path:
    check_reachable(workdir)
    return expanded(workdir).joinpath(*parts)


# -- the configuration and the progress ---------------------------------------------------------------------------


def read_config(workdir: epath.PathLike) -> dict[str, Any]:
    """Reads the configuration that a training wrote. If it is damaged, that of the latest checkpoint replaces it.

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
    if replacement := _if_changed(workdir, path):
        return replacement
    if exported.exists(workdir):
        remedy, config = exported.REMEDY, Exported(workdir).config()
    else:
        remedy = "Start the training again: it writes this file at its beginning."
        config = json_files.read(path, dict, CheckpointError, remedy)
    if wrong := _first_wrong(config, _SECTIONS):
        raise CheckpointError(f"{path} is damaged: {wrong}. {remedy}")
    return config


def save_config(workdir: epath.PathLike, config: ConfigDict | Mapping[str, Any]) -> None:
    """Writes config.json and its checksum. A folder with this file is a workdir."""
    checksummed.write_json(_path(workdir, "config.json"), to_json(config))


def _first_wrong(found: Mapping[str, Any], sections: Mapping[str, Any], prefix: str = "") -> str | None:
    """Describes the first key that is missing or has a value of another kind; None if there is none."""
    for key, kind in sections.items():
        name = key.rstrip("?")
        if name != key and found.get(name) is None:
            continue
        value, expected = found.get(name), dict if isinstance(kind, dict) else kind
        if not isinstance(value, expected) or isinstance(value, bool):
            return f"{prefix}{name} is {'missing' if name not in found else type(value).__name__}"
        if isinstance(kind, dict) and (wrong := _first_wrong(value, kind, f"{prefix}{name}.")):
            return wrong
    return None


def _if_changed(workdir: epath.PathLike, path: epath.Path) -> dict[str, Any] | None:
    """Returns the configuration of the latest checkpoint if the file changed since a training wrote it, else None."""
    if not checksummed.has_checksum(path):
        return None
    try:
        checksummed.read(path)
        return None
    except DamagedError as error:
        step = latest_step(workdir)
        if step is None:
            remedy = "Start the training again: it writes this file at its beginning."
            raise DamagedError(f"{path} changed since the training wrote it. {remedy}") from error
    checksummed.log_once(
        logging.WARNING,
        f"{path} changed since the training wrote it: the configuration of the checkpoint of step {step} is read "
        f"instead. If you changed the file on purpose, delete {path.name}.sha256.",
    )
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        return checkpoints.config()


def has_config(workdir: epath.PathLike) -> bool:
    """Returns whether `read_config` finds an intact configuration that is not empty."""
    try:
        return bool(read_config(workdir))
    except UserError:
        return False


def steps_of(workdir: epath.PathLike) -> Sequence[int]:
    """Returns the steps of the checkpoints of the training in `workdir`, ascending; () without one.

    An exported folder has the step that was exported.
    """
    if exported.exists(workdir):
        return Exported(workdir).steps
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
    try:
        found = json_files.read(_path(workdir, "finished.json"), dict, CheckpointError, "")
    except CheckpointError:
        return {}
    counts = [found.get(name) for name in ("step", "steps", "without_improvement")]
    whole = all(type(count) is int for count in counts) and isinstance(found.get("best"), (dict, type(None)))
    return found if whole else {}


# -- the image tokenizer ------------------------------------------------------------------------------------------


def has_tokenizer(workdir: epath.PathLike) -> bool:
    """Returns whether the workdir holds a complete frozen image tokenizer."""
    return frozen.exists(_path(workdir, "image_tokenizer"))


def save_tokenizer(workdir: epath.PathLike, tokenizer: ImageTokenizer, params: PyTree) -> None:
    """Freezes an image tokenizer into `workdir`."""
    frozen.save(_path(workdir, "image_tokenizer"), tokenizers.to_dict(tokenizer), params)


def load_tokenizer(workdir: epath.PathLike, step: int | None = None) -> tuple[ImageTokenizer, PyTree]:
    """Loads the image tokenizer of a workdir: a prior's frozen one, or the one that a dVAE training trained.

    A training that keeps its best checkpoint (`config.keep.best`) gives the best one, any other one the latest. No
    other checkpoint replaces a damaged one.

    Args:
      workdir: of a prior, of a dVAE training, or of an importer.
      step: step of another checkpoint of the training.

    Raises:
      CheckpointError: there is neither, or no checkpoint of this step.
      DamagedError: the module, or the checkpoint, is damaged or missing.
    """
    if has_tokenizer(workdir):
        folder = _path(workdir, "image_tokenizer")
        if step is not None:
            raise CheckpointError(f"{folder} is frozen and has no steps: leave out config.tokenizer_step={step}.")
        options, params = frozen.load(folder, "Delete it: the training then freezes its tokenizer there again.")
        return tokenizers.from_dict(options), params
    config = read_config(workdir)
    if config.get("task") not in tokenizers.TASKS:
        expected = " or ".join(repr(task) for task in tokenizers.TASKS)
        raise CheckpointError(
            f"{workdir} holds no image tokenizer: its task is {config.get('task')!r}, not {expected}."
        )
    chosen = tokenizer_step(workdir) if step is None else step
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        try:
            tokenizer = tokenizers.of_training(checkpoints.config(chosen))
            return tokenizer, tokenizers.own_params(tokenizer, checkpoints.restore_params(chosen))
        except DamagedError as error:
            raise _lost_checkpoint(workdir, chosen, checkpoints.steps, "is damaged") from error


def tokenizer_step(workdir: epath.PathLike) -> int | None:
    """Returns the step of the checkpoint that `load_tokenizer` reads from a training, or None without a checkpoint.

    Raises:
      DamagedError: this checkpoint is missing, or `finished.json`, which names it, is damaged.
    """
    finished, steps, path = dict(read_finished(workdir)), steps_of(workdir), _path(workdir, "finished.json")
    checksum = finished.pop("checksum", None)
    if path.exists() and (not finished or checksum not in (None, checksums.of_json(finished))):
        raise DamagedError(f"{path} is damaged. Run the same training again: it writes this file at its end.")
    best = finished.get("best") if read_config(workdir).get("keep", {}).get("best", 0) > 0 else None
    if best and best["step"] in steps:
        with Checkpoints(str(workdir), read_only=True) as checkpoints:
            measured = checkpoints.metrics(best["step"])
        if measured and not math.isclose(measured.get(best["metric"], math.nan), best["value"], rel_tol=1e-5):
            raise DamagedError(
                f"{path} is of another training: {best} is not what the checkpoint of this step measured."
            )
        return best["step"]
    latest, end = max(steps, default=None), finished.get("step", 0)
    if latest is not None and (end > latest or best and end == latest):
        raise _lost_checkpoint(workdir, best["step"] if best else end, steps, "is missing")
    return latest


def _lost_checkpoint(workdir: epath.PathLike, step: int | None, steps: Sequence[int], fault: str) -> DamagedError:
    others = [other for other in steps if other != step]
    return DamagedError(
        f"{workdir}: the checkpoint of step {step}, from which the image tokenizer is read, {fault}. "
        + (f"--config.tokenizer_step={others[-1]} takes another one (there are {others}). " if others else "")
        + f"Or train it again: the command of {workdir} resumes from its last good checkpoint."
    )


# -- the text model -----------------------------------------------------------------------------------------------


def text_model_path(workdir: epath.PathLike) -> epath.Path:
    """Returns the path of the workdir's text model. Without one, it is the path of the one to train."""
    found = [path for name in text_models.FILE_NAMES if (path := _path(workdir, "text", name)).exists()]
    return found[0] if found else _path(workdir, "text", TextModel.file_name)


def save_text_model(workdir: epath.PathLike, model: CaptionModel) -> None:
    """Freezes a text model into `workdir`."""
    model.save(_path(workdir, "text", model.file_name))


def check_text_section(section: ConfigDict) -> None:
    """Checks the sizes of `config.text`; raises a `ConfigError`."""
    natural("config.text.vocab_size", section["vocab_size"], 1, LARGEST_VOCABULARY)
    natural("config.text.length", section["length"], 1, LONGEST_STREAM)


def ensure_text_model(
    section: ConfigDict,
    captions: Iterable[str],
    workdir: epath.PathLike,
    read: Callable[[str], CaptionModel] = text_models.load,
    train: Callable[[Iterable[str], int], CaptionModel] = TextModel.train,
) -> CaptionModel:
    """Loads the workdir's text model, after copying it from `section.path` or training it if it does not exist yet.

    Args:
      section: {"vocab_size", "length", "path"}.
      captions: of the training split. They are read only to train the model.
      workdir: directory of the run.
      read: reads the file `section.path`.
      train: makes a model of captions, given the largest size of its vocabulary.

    Raises:
      ConfigError: the model has a larger vocabulary than the section, or a size is below one.
    """
    check_text_section(section)
    path = text_model_path(workdir)
    with first_host_first(f"the text model {path}"):
        if not path.exists():
            if section.path:
                save_text_model(workdir, read(section.path))
            else:
                logging.info("Training the text model (%s)", path)
                save_text_model(workdir, train(captions, section.vocab_size))
    model = text_models.load(text_model_path(workdir))
    if model.vocab_size > section.vocab_size:
        raise ConfigError(
            f"The text model {path} has {model.vocab_size} ids but config.text.vocab_size is {section.vocab_size}: "
            f"set config.text.vocab_size={model.vocab_size}, or start in another workdir."
        )
    return model


def load_text_model(workdir: epath.PathLike) -> CaptionModel:
    """Loads the text model of a prior's workdir.

    Raises:
      DataError: it is missing, or not a text model.
      DamagedError: it changed since the training wrote it.
    """
    return text_models.load(text_model_path(workdir))
