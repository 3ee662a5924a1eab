"""Starting a training from another run's parameters, where both models have them.

The two priors share their trunk and their embeddings by name and shape (`priors/`): a MaskGIT prior that starts from an
autoregressive one already reads captions and knows which tokens are alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from absl import logging

from dalle_jax.checkpoint import Checkpoints
from dalle_jax.errors import ConfigError
from dalle_jax.train_step import TrainState


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
        given = _by_name(jax.device_get(checkpoints.restore_params()))
    own = _by_name(state.params)
    fresh = [name for name, x in own.items() if name not in given or given[name].shape != x.shape]
    chosen = [
        x if name in fresh else jax.device_put(given[name].astype(x.dtype), x.sharding) for name, x in own.items()
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


def _by_name(params) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(params)}
