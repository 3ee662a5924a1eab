"""Starting a training from another run's parameters, where both models have them.

The two priors share their trunk and their embeddings by name and shape (`priors/`): a MaskGIT prior that starts from an
autoregressive one already reads captions and knows which tokens are alike. Their layers are folded into scans by their
attention patterns, and so not alike: they are compared one by one.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.errors import ConfigError
from dalle_jax.models.trunk import unstack
from dalle_jax.pytree import by_path
from dalle_jax.training.step import TrainState


def warm_start(state: TrainState, workdir: str) -> TrainState:
    """A fresh state with the parameters of another run's latest checkpoint wherever name and shape agree.

    Args:
      state: fresh, on its mesh; its average, where it keeps one, starts at the same parameters.
      workdir: of the other run; its average is read where it has one. It is read whole by every host.

    Raises:
      ConfigError: no parameter agrees.
      CheckpointError: there is no checkpoint.
    """
    with Checkpoints(str(workdir), read_only=True) as checkpoints:
        params = jax.device_get(checkpoints.restore_params())
    own, given = by_path(state.params), by_path(_layer_by_layer(params))
    unit = len(state.params.get("trunk", {}).get("units", ()))
    found = {name: _folded(name, x.shape, given, unit) for name, x in own.items()}
    fresh = [name for name, x in own.items() if found[name] is None or found[name].shape != x.shape]
    chosen = [
        x if name in fresh else jax.device_put(found[name].astype(x.dtype), x.sharding) for name, x in own.items()
    ]
    params, total = jax.tree.unflatten(jax.tree.structure(state.params), chosen), len(chosen)
    if len(fresh) == total:
        raise ConfigError(
            f"config.start_from={workdir!r}: none of its parameters has the name and shape of one of this model's. "
            "Give the workdir of a prior with the same model.trunk width and heads, or leave start_from out."
        )
    logging.info(
        "%d of %d parameters from %s; fresh: %s", total - len(fresh), total, workdir, ", ".join(fresh) or "none"
    )
    return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def _layer_by_layer(params):
    """A prior's parameters with each layer of its trunk by itself; others as they are."""
    return {**params, "trunk": unstack(params["trunk"])} if "trunk" in params else params


def _folded(name: str, shape: tuple[int, ...], given: dict[str, np.ndarray], unit: int) -> np.ndarray | None:
    """The given array of this name; of layers in a scan over units of so many, theirs, stacked. None: not there."""
    place = re.fullmatch(r"trunk/units/layer_(\d+)/(.*)", name)
    if place is None:
        return given.get(name)
    layers = [given.get(f"trunk/layer_{r * unit + int(place[1])}/{place[2]}") for r in range(shape[0])]
    if any(layer is None or layer.shape != shape[1:] for layer in layers):
        return None
    return np.stack(layers)
