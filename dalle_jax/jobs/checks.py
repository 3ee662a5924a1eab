"""Rejects a training that cannot work before anything is trained: its configuration, its sizes and its data.

A prior needs hours of training after that of its tokenizer, and a quickstart several trainings. Each fault that can be
found at the beginning is found here: the whole program is traced with the shapes of its arrays, without data.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.folders import check_step
from dalle_jax.configuration.options import from_config
from dalle_jax.configuration.size_rules import rules_of, with_largest
from dalle_jax.configuration.values import check_seed, natural
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import (
    DataOptions,
    Source,
    UnreadableExample,
    decode_captions,
    decode_image,
)
from dalle_jax.distributed.sharding import on_mesh
from dalle_jax.distributed.turns import first_host_first, is_first
from dalle_jax.errors import ConfigError, DataError, UserError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.jobs import earlier
from dalle_jax.jobs.tokenizers import has_tokenizer
from dalle_jax.optim import optimizers
from dalle_jax.priors.registry import condition_of
from dalle_jax.storage.files import check_writable, expanded, is_regular_file
from dalle_jax.tasks import registry
from dalle_jax.tasks.encoded_split import check_tokenizer
from dalle_jax.tasks.prior import EACH_BATCH, ONCE
from dalle_jax.text_to_image.drawing import MOST_IMAGES
from dalle_jax.training.step import make_init
from dalle_jax.training.validation import check_duration, mesh_and_options, validate
from dalle_jax.training.warm_start import check_start_from

_LOOKED_AT = 100  # examples


def check_config(config: ConfigDict, workdir: str, ahead: Collection[str] = ()) -> None:
    """Checks the configuration of a training and of the tokenizer that would be trained for it.

    Args:
      config: as from `preparation.prepare`. Sizes may be open.
      workdir: directory of the run.
      ahead: workdirs of trainings that run before this one; they need not exist yet.

    Raises:
      UserError: the first fault that is found. Its message names the key.
    """
    for part in (config, *([config.tokenizer] if "tokenizer" in config else [])):
        rules_of(part)
        check_duration(part)  # first that of the command, of which the tokenizer has a share
    start, given = config.get("start_from"), config.get("tokenizer_from")
    if start and start not in ahead:
        check_start_from(config, workdir)
    if given and given not in ahead and not has_tokenizer(given):
        raise ConfigError(
            f"config.tokenizer_from={given!r} holds no image tokenizer; expected the workdir of a training, or a "
            "folder that an importer of dalle_jax.pretrained wrote."
        )
    _check_tokenizer_step(config, workdir, ahead)
    earlier.check_resumes(config, workdir)
    config = with_largest(config)
    tokenizer = _existing_tokenizer(config, workdir, ahead)
    own = "tokenizer" in config and tokenizer is None
    parts = {"tokenizer.": config.tokenizer, "": config} if own else {"": config}
    for prefix, part in parts.items():
        with prefixed(prefix):
            validate(part)
            registry.check_config(part)
    _check_tokens(config, workdir, ahead)
    for prefix, part in parts.items():
        with prefixed(prefix):
            _trace(part, None if prefix else tokenizer)


def _check_tokenizer_step(config: ConfigDict, workdir: str, ahead: Collection[str]) -> None:
    """Checks that the tokenizer to freeze from `config.tokenizer_from` has its checkpoint (`config.tokenizer_step`)."""
    given, step = config.get("tokenizer_from"), config.get("tokenizer_step")
    if not given or given in ahead or workdirs.has_tokenizer(workdir):
        return
    steps = [] if workdirs.has_tokenizer(given) else list(workdirs.steps_of(given))
    if step is None and steps:
        workdirs.tokenizer_step(given)
    elif step is not None and step not in steps:
        raise ConfigError(
            f"config.tokenizer_step={step}, but config.tokenizer_from={given!r} has checkpoints of steps {steps}: give "
            "one of them, or leave tokenizer_step out."
        )


def _existing_tokenizer(config: ConfigDict, workdir: str, ahead: Collection[str]) -> ImageTokenizer | None:
    """Returns the tokenizer that exists already, or None if it is that of `config.tokenizer`."""
    if "tokenizer" not in config:
        return None
    for place in (workdir, config.tokenizer_from):
        if place and workdirs.has_tokenizer(place):
            return workdirs.load_tokenizer(place)[0]
    if config.tokenizer_from and config.tokenizer_from not in ahead:
        return tokenizers.of_training(workdirs.read_config(config.tokenizer_from))
    return None


def _check_tokens(config: ConfigDict, workdir: str, ahead: Collection[str]) -> None:
    """Checks that the tokens of `config.data_tokens` are those of the prior's image tokenizer, if it exists already."""
    given = config.get("data_tokens")
    if given in (None, ONCE, EACH_BATCH):
        return
    own = workdirs.has_tokenizer(workdir)
    place = workdir if own else config.tokenizer_from
    if place and place not in ahead:
        check_tokenizer(given, *workdirs.load_tokenizer(place, None if own else config.get("tokenizer_step")))


def check_drawing(config: ConfigDict) -> None:
    """Checks the keys that jobs which draw share: `seed`, `rows_at_once` and `step`.

    Raises:
      ConfigError: another value than the key can have.
    """
    check_seed(config.seed, "config.seed")
    natural("config.rows_at_once", config.rows_at_once, 1, MOST_IMAGES)
    check_step(config.get("step"), "config.step")


@contextlib.contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """Writes whole keys into the messages about a section: "config.tokenizer.model.hidden" with "tokenizer."."""
    try:
        yield
    except UserError as error:
        if not prefix:
            raise
        raise type(error)(str(error).replace("config.", f"config.{prefix}")) from error


def _trace(config: ConfigDict, tokenizer: ImageTokenizer | None) -> None:
    """Traces initialisation, loss and optimizer of one training with the shapes of their arrays."""
    mesh, options, average = mesh_and_options(config)
    optimizer = optimizers.make_optimizer(options)
    try:
        task, batch = registry.abstract(config, tokenizer)
        _, state = make_init(task, optimizer, average, mesh, config.seed)
        step, key = jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(jax.random.key, 0)
        with on_mesh(mesh):
            jax.eval_shape(task.loss, state.params, task.frozen, batch, key, step)
            jax.eval_shape(optimizer.update, state.params, state.opt_state, state.params)
    except UserError:
        raise
    except (TypeError, ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        found = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(f"config.model, config.data and config.text do not fit each other: {found}") from error


def check_data(config: ConfigDict) -> None:
    """Looks at up to 100 examples of each split: they must hold an image, and a caption if the training reads text.

    Other data of its tokenizer are looked at as well.

    Args:
      config: as from `preparation.prepare`.

    Raises:
      ConfigError: the captions do not fit `config.text`.
      DataError: a split is missing or empty, or nothing in it can be read.
    """
    options = from_config(DataOptions, config.data, "data")
    with_text = "text" in config
    for split in dict.fromkeys((options.train_split, options.eval_split)):
        captions = _look(open_source(options, split), with_text)
        if with_text and split == options.train_split and not config.text.path and config.text.vocab_size is not None:
            condition_of(config).train(captions, config.text.vocab_size)  # an error if the vocabulary is too small
    check_tokenizer_data(config)


def check_tokenizer_data(config: ConfigDict) -> None:
    """Does the same as `check_data` for the data of the tokenizer that would be trained, if they are others."""
    if "tokenizer" in config and not config.tokenizer_from:
        options, inner = (from_config(DataOptions, each.data, "data") for each in (config, config.tokenizer))
        if any(getattr(inner, key) != getattr(options, key) for key in ("path", "train_split", "eval_split")):
            check_data(config.tokenizer)


def _look(source: Source, with_text: bool) -> list[str]:
    """Returns the captions of up to 100 examples; the first readable image is decoded."""
    count = len(source)
    if not count:
        raise DataError(f"{source.description}: it holds no examples.")
    captions, seen, error = [], False, None
    for index in np.unique(np.linspace(0, count - 1, min(count, _LOOKED_AT), dtype=np.int64)):
        try:
            record = source.record(int(index))
            seen = seen or decode_image(record) is not None
            captions += decode_captions(record) if with_text else []
        except UnreadableExample as unreadable:
            error = unreadable
        if seen and not with_text:
            break
    tried = min(count, _LOOKED_AT)
    if not seen:
        raise DataError(f"{source.description}: none of {tried} images can be read. The last one: {error}.")
    if with_text and not captions:
        raise DataError(
            f"{source.description}: none of {tried} examples has a readable caption, which this training needs. "
            f"The last one: {error}. docs/data.md shows where captions stand."
        )
    return captions


def check_text_model(path: str) -> None:
    """Checks that the file `config.text.path` exists; raises a `ConfigError`."""
    if not is_regular_file(path):
        raise ConfigError(
            f"config.text.path={path!r} is no file; expected the text model of a training, or a file of classes."
        )


def check_files(config: ConfigDict, workdir: str, ahead: Collection[str] = ()) -> None:
    """Checks that the text model can be used and that the workdirs can be written; creates the workdirs.

    Args:
      config: a training configuration whose tokenizer's workdir is chosen.
      workdir: directory of the run.
      ahead: see `check_config`.

    Raises:
      ConfigError: a file is missing, the text model is too large, or a directory cannot be written.
    """
    path = config.text.path if "text" in config else None
    if path and (expanded(path).exists() or not any(str(path).startswith(str(run)) for run in ahead)):
        check_text_model(path)
        size, model = config.text.vocab_size, condition_of(config).read(path)
        if config.data.bpe_dropout and not model.takes_dropout:
            raise ConfigError(
                f"config.data.bpe_dropout is {config.data.bpe_dropout}, and the text model {path} has no BPE dropout: "
                "give --config.data.bpe_dropout=0."
            )
        if size is not None and model.vocab_size > size:
            raise ConfigError(
                f"config.text.vocab_size is {size}, but the text model {path} has {model.vocab_size} ids: give at "
                f"least --config.text.vocab_size={model.vocab_size}."
            )
    folders = [("--workdir", workdir)]
    if "tokenizer" in config and not config.tokenizer_from:
        folders.append(("config.tokenizer.workdir", config.tokenizer.workdir))
    for key, folder in folders:
        if not folder:
            raise ConfigError(f"{key} is empty: give a directory for the run's files.")
        with first_host_first(f"{key} {folder}"):
            if is_first():
                check_writable(folder)
