"""The train job: trains an image tokenizer first if the prior needs one, then what the configuration describes.

`configs/prior.py` holds the complete configuration of its tokenizer, so that one command works on a fresh machine.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.compatibility import to_json
from dalle_jax.checkpoints.ownership import owned
from dalle_jax.data.sources.once import opened_once
from dalle_jax.distributed.turns import first_host_first, first_host_says, is_first
from dalle_jax.errors import DamagedError
from dalle_jax.jobs import earlier, tokenizers
from dalle_jax.jobs.checks import check_config, check_data, check_files, check_tokenizer_data
from dalle_jax.jobs.data import look_at
from dalle_jax.jobs.preparation import prepare
from dalle_jax.jobs.sizes import settle
from dalle_jax.storage import checksummed
from dalle_jax.storage.files import expanded
from dalle_jax.training import budget
from dalle_jax.training.loop import train
from dalle_jax.training.step import TrainState


def run(config: ConfigDict, workdir: str) -> TrainState:
    """Trains the task of `config`, after its image tokenizer if it needs one that does not exist.

    A section `tokenizer` of `config` is a complete training configuration whose data follows `config.data`. The frozen
    tokenizer then comes from the first of these that exists:
      1. `workdir` itself.
      2. `config.tokenizer_from`: a workdir, or a folder that an importer of `dalle_jax.pretrained` wrote.
      3. `config.tokenizer.workdir`, if it was trained there with the same data and configuration, see
         `tokenizers.choose_workdir`. Otherwise it is trained there first.
    `start_from` names the workdir of another run. Tokenizer and text model then come from there by default.

    Args:
      config: a training configuration. Sizes that are None follow the data set (`sizes.settle`).
      workdir: directory of the run.

    Returns:
      The final state.

    Raises:
      UserError: an invalid configuration or data, before any training begins, or an error of `train`.
    """
    began = time.perf_counter()
    with owned(workdir):
        with opened_once():
            config = _check_files(config, workdir)
            look_at(config, workdir)  # also rejects data that cannot be used
            check_tokenizer_data(config)
            config = with_plan(settle(config, workdir), workdir)
        _write_config(config, workdir)
        if "tokenizer" in config and not first_host_says("has a tokenizer", workdirs.has_tokenizer(workdir)):
            _freeze_tokenizer(config, workdir)
            config = with_plan(config, workdir)  # the tokenizer's steps are fixed now
        return train(config, workdir, began=began)


def with_plan(config: ConfigDict, workdir: str) -> ConfigDict:
    """Returns a copy of a chain's configuration in which `minutes` decide about `steps`.

    The steps of each training with `minutes` become those of its existing run, or None until its own plan.

    Args:
      config: the configuration of the last training.
      workdir: of the last training.
    """
    config = budget.opened(config, workdir)
    if "tokenizer" in config and not config.tokenizer_from:
        inner = config.tokenizer
        inner.steps = budget.opened(inner, inner.workdir).steps
    return config


def check(config: ConfigDict, workdir: str, ahead: Collection[str] = ()) -> ConfigDict:
    """Rejects whatever can be rejected before the first training of a chain begins.

    Args:
      config: a training configuration.
      workdir: directory of the run; created here.
      ahead: workdirs of trainings that run before this one; they need not exist yet.

    Returns:
      The prepared configuration; see `preparation.prepare`. The workdir of its tokenizer is chosen.

    Raises:
      UserError: the first fault that is found. Its message names the key.
    """
    with opened_once():
        config = _check_files(config, workdir, ahead)
        check_data(config)
    return config


def _check_files(config: ConfigDict, workdir: str, ahead: Collection[str] = ()) -> ConfigDict:
    """Does the same as `check`, but does not read the data."""
    config = prepare(config)
    check_config(config, workdir, ahead)
    if "tokenizer" in config and not config.tokenizer_from and not workdirs.has_tokenizer(workdir):
        config.tokenizer.workdir = first_host_says("tokenizer", tokenizers.choose_workdir(config))
    check_files(config, workdir, ahead)
    return config


def _write_config(config: ConfigDict, workdir: str) -> None:
    """Writes config.json at once, so that a chain which is interrupted early keeps its sizes."""
    if is_first() and not earlier.begun(workdir):
        checksummed.write_json(expanded(workdir) / "config.json", to_json(config))


def _freeze_tokenizer(config: ConfigDict, workdir: str) -> None:
    """Copies the tokenizer of a prior into its workdir, after training it if needed."""
    source = config.tokenizer_from or config.tokenizer.workdir
    planning = not config.tokenizer_from and config.tokenizer.steps is None
    trained = bool(config.tokenizer_from) or not planning and workdirs.is_complete(source, config.tokenizer)
    if not first_host_says("tokenizer is trained", trained):
        with owned(source):
            logging.info("%s needs an image tokenizer, and %s holds none yet: training it first.", workdir, source)
            _write_config(config.tokenizer, source)
            train(config.tokenizer, source)
    step = config.get("tokenizer_step")
    try:
        tokenizer, params = workdirs.load_tokenizer(source, step)
    except DamagedError as error:
        if config.tokenizer_from or step is not None:
            raise
        logging.warning("%s It is trained on now.", error)
        with owned(source):
            train(config.tokenizer, source)
        tokenizer, params = workdirs.load_tokenizer(source)
    logging.info("Image tokenizer: %s", tokenizers.describe(source, step))
    with first_host_first("the frozen image tokenizer"):
        if not workdirs.has_tokenizer(workdir):
            workdirs.save_tokenizer(workdir, tokenizer, params)
