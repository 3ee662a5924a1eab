"""A workdir whose best checkpoint is not its latest one."""

import json
import shutil
import types

import jax
import jax.numpy as jnp

from dalle_jax.checkpoints.checkpoints import Checkpoints


def with_a_worse_checkpoint(workdir, copy, metric):
    """Copies a workdir, adds a checkpoint of other parameters with a worse metric, and returns the best step."""
    shutil.copytree(workdir, copy)
    with Checkpoints(str(copy), keep_last=2) as checkpoints:
        best, params, config = checkpoints.latest_step, checkpoints.restore_params(), checkpoints.config()
        measured = json.loads((checkpoints.directory / str(best) / "metrics" / "metrics").read_text())
        items = {"params": jax.tree.map(lambda x: x + 1, params), "rest": {"step": jnp.int32(best + 1)}}
        no_data = types.SimpleNamespace(get_state=lambda: 0)
        checkpoints.save(best + 1, items, no_data, config, {metric: measured[metric] + 1})
    return best
