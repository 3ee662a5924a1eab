"""Initialisation of a training from the parameters of another run.

Every task can start from a run of the same task, for instance after its data set changed.

The two priors share the names and shapes of their trunk and embeddings (`priors/`). A MaskGIT prior that starts from
an autoregressive one therefore already reads captions and knows which tokens are similar. Scans stack the layers by
their attention patterns, which differ between the priors, so layers are compared one by one.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints.runs import open_run
from dalle_jax.checkpoints.workdir import latest_step, read_config
from dalle_jax.errors import CheckpointError, ConfigError
from dalle_jax.models.trunk import unstack
from dalle_jax.pytree import PyTree, by_path
from dalle_jax.training.step import TrainState


def warm_start(state: TrainState, workdir: str) -> TrainState:
    """Replaces parameters by those of another run's latest checkpoint where name and shape agree.

    Args:
      state: a fresh state on its mesh. Its average, if it keeps one, starts at the new parameters.
      workdir: of the other run. Its average is read if it has one. Every host reads all of it.

    Returns:
      The new state.

    Raises:
      ConfigError: no parameter agrees.
      CheckpointError: there is no checkpoint.
    """
    with _named(workdir), open_run(workdir) as checkpoints:
        given = by_path(_unstacked(jax.device_get(checkpoints.restore_params())))
    own = by_path(state.params)
    unit = len(state.params.get("trunk", {}).get("units", ()))
    found = {name: _find(name, x.shape, given, unit) for name, x in own.items()}
    fresh = [name for name, x in own.items() if found[name] is None or found[name].shape != x.shape]
    chosen = [
        x if name in fresh else jax.device_put(found[name].astype(x.dtype), x.sharding) for name, x in own.items()
    ]
    params, total = jax.tree.unflatten(jax.tree.structure(state.params), chosen), len(chosen)
    if len(fresh) == total:
        raise ConfigError(
            f"config.start_from={workdir!r}: none of its parameters has the name and shape of one of this model's. "
            "Give the workdir of a training of the same task with the same model sizes (for priors model.trunk.width "
            "and heads), or leave start_from out."
        )
    logging.info(
        "%d of %d parameters from %s; fresh: %s", total - len(fresh), total, workdir, ", ".join(fresh) or "none"
    )
    return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def check_start_from(config: ConfigDict, workdir: str) -> None:
    """Checks early that `config.start_from` holds a run of the same task, unless the run in `workdir` has begun.

    Raises:
      ConfigError: it holds none.
    """
    start_from = config.start_from
    if latest_step(workdir) is not None:
        return
    if latest_step(start_from) is None:
        raise ConfigError(
            f"config.start_from={start_from!r} holds no checkpoint: expected the workdir of a training. Check the "
            "path, or leave start_from out to start from scratch."
        )
    if (task := read_config(start_from).get("task")) != config.task:
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


def _unstacked(params: PyTree) -> PyTree:
    """Separates the stacked layers of a prior's trunk. Other parameters stay as they are."""
    return {**params, "trunk": unstack(params["trunk"])} if "trunk" in params else params


def _find(name: str, shape: tuple[int, ...], given: dict[str, np.ndarray], unit: int) -> np.ndarray | None:
    """Finds the given array for a parameter, or None.

    For a parameter of a scan, whose repeats are units of `unit` layers, it stacks the arrays of the single layers.
    """
    place = re.fullmatch(r"trunk/units/layer_(\d+)/(.*)", name)
    if place is None:
        return given.get(name)
    layers = [given.get(f"trunk/layer_{r * unit + int(place[1])}/{place[2]}") for r in range(shape[0])]
    if any(layer is None or layer.shape != shape[1:] for layer in layers):
        return None
    return np.stack(layers)
