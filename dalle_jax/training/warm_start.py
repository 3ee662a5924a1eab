"""Initialisation of a training from the parameters of another run.

Every task can start from a run of the same task, for instance after its data set changed. The run may be an exported
folder. The training of an image tokenizer can also start from a frozen one: imported, or that of a prior.

`priors.matching` says which parameters agree. A MaskGIT prior that starts from an autoregressive one therefore already
reads captions and knows which tokens are similar.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints.runs import open_run
from dalle_jax.checkpoints.workdir import (
    has_tokenizer,
    latest_step,
    load_text_model,
    load_tokenizer,
    read_config,
    text_model_path,
)
from dalle_jax.errors import CheckpointError, ConfigError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.priors import trained
from dalle_jax.priors.matching import Rows, Vocabularies, match
from dalle_jax.pytree import PyTree
from dalle_jax.training.step import TrainState


def warm_start(state: TrainState, start_from: str, workdir: str, task: str) -> TrainState:
    """Replaces parameters by those of another run's latest checkpoint where name and shape agree.

    If the text models differ, the embeddings of the pieces that both have are taken over.

    Args:
      state: a fresh state on its mesh. Its average, if it keeps one, starts at the new parameters.
      start_from: workdir or export of the other run, or a folder with a frozen image tokenizer. The average of a run
        is read if it has one. Every host reads all of it.
      workdir: of this run, which may hold a text model.
      task: `config.task` of this run.

    Returns:
      The new state.

    Raises:
      ConfigError: no parameter agrees.
      CheckpointError: there is no checkpoint.
    """
    with _named(start_from):
        given = jax.device_get(_stored_params(start_from, task))
    found = match(state.params, given, vocabularies(start_from, workdir))
    fresh, total = [name for name, array in found.items() if array is None], len(found)
    if len(fresh) == total:
        raise ConfigError(
            f"config.start_from={start_from!r}: none of its parameters has the name and shape of one of this model's. "
            "Give the workdir of a training of the same task with the same model sizes (for priors model.trunk.width "
            "and heads), or leave start_from out."
        )
    chosen = [_replaced(x, new) for x, new in zip(jax.tree.leaves(state.params), found.values(), strict=True)]
    params = jax.tree.unflatten(jax.tree.structure(state.params), chosen)
    logging.info(
        "%d of %d parameters from %s; fresh: %s; rows of common text alone: %s",
        total - len(fresh), total, start_from, ", ".join(fresh) or "none",
        ", ".join(name for name, array in found.items() if isinstance(array, Rows)) or "none",
    )  # fmt: skip
    return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def _stored_params(start_from: str, task: str) -> PyTree:
    """Reads the parameters in a folder; see `warm_start`."""
    if _is_frozen(start_from, task):
        return load_tokenizer(start_from)[1]
    with open_run(start_from) as run:
        return trained.restore(run, start_from)


def _is_frozen(start_from: str, task: str) -> bool:
    """Returns whether a training of `task` starts from the frozen image tokenizer of a folder."""
    return task in tokenizers.TASKS and has_tokenizer(start_from)


def _replaced(x: jax.Array, new: np.ndarray | Rows | None) -> jax.Array:
    """Returns a parameter with the values that `match` found for it, on the devices of the old one."""
    if new is None:
        return x
    if isinstance(new, Rows):
        values = new.values.astype(x.dtype)
        return jax.jit(lambda table: table.at[new.places].set(values), out_shardings=x.sharding)(x)
    return jax.device_put(new.astype(x.dtype), x.sharding)


def vocabularies(start_from: str, workdir: str) -> Vocabularies | None:
    """Returns the text vocabularies of two runs of priors if their text models differ, else None."""
    paths = [text_model_path(folder) for folder in (start_from, workdir)]
    if not all(path.exists() for path in paths) or paths[0].read_bytes() == paths[1].read_bytes():
        return None
    given, own = (load_text_model(folder) for folder in (start_from, workdir))
    listed = [model.pieces() if hasattr(model, "pieces") else None for model in (given, own)]
    return Vocabularies(*listed, given.vocab_size, own.vocab_size)


def check_start_from(config: ConfigDict, workdir: str) -> None:
    """Checks early that `config.start_from` holds a run of the same task, unless the run in `workdir` has begun.

    Raises:
      ConfigError: it holds none.
    """
    start_from = config.start_from
    if latest_step(workdir) is not None:
        return
    if _is_frozen(start_from, config.task):
        task = load_tokenizer(start_from)[0].kind
    elif latest_step(start_from) is None:
        raise ConfigError(
            f"config.start_from={start_from!r} holds no checkpoint: expected the workdir of a training. Check the "
            "path, or leave start_from out to start from scratch."
        )
    else:
        task = read_config(start_from).get("task")
    if task != config.task:
        raise ConfigError(
            f"config.start_from={start_from!r} holds a training of task {task!r}, and config.task is {config.task!r}. "
            "A training starts from one of the same task."
        )


@contextlib.contextmanager
def _named(workdir: str) -> Iterator[None]:
    """Names the key in a `CheckpointError` of the block."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"config.start_from={workdir!r}: {error}") from error
