"""Golden numbers of one dVAE update. After a change that is meant to alter them: `python tests/golden/make_dvae.py`."""

from __future__ import annotations

import json
import pathlib

import flax.linen as nn
import jax
import numpy as np
import optax

from dalle_jax import schedules
from dalle_jax.models.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.tasks.dvae import DVAETask

PATH = pathlib.Path(__file__).with_name("dvae.json")


def measure() -> dict[str, dict[str, float]]:
    """Loss and scalars of a small dVAE on seeded pictures, before and after one Adam update."""
    options = DVAEOptions(
        image_size=16,
        vocab_size=32,
        hidden=16,
        groups=2,
        blocks_per_group=1,
        codebook_dim=8,
        in_kernel=3,
        stem_factor=2,
    )
    task = DVAETask(
        DVAETokenizer(options),
        temperature=schedules.make({"kind": "constant", "value": 0.7}),
        kl_weight=schedules.make({"kind": "constant", "value": 6.6}),
    )
    blocks = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    batch = {"image": blocks.repeat(4, axis=1).repeat(4, axis=2)}
    params = nn.meta.unbox(jax.jit(task.init)(jax.random.key(0)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, opt_state, step):
        key = jax.random.fold_in(jax.random.key(1), step)
        (loss, scalars), grads = jax.value_and_grad(task.loss, has_aux=True)(params, {}, batch, key, step)
        updates, opt_state = optimizer.update(grads, opt_state)
        scalars = {"loss": loss, **scalars, "gradient_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), opt_state, scalars

    opt_state, measured = optimizer.init(params), {}
    for step, name in enumerate(("before", "after")):
        params, opt_state, scalars = update(params, opt_state, step)
        measured[name] = {key: float(value) for key, value in scalars.items()}
    return measured


if __name__ == "__main__":
    PATH.write_text(json.dumps(measure(), indent=2) + "\n")
    print(PATH.read_text())
