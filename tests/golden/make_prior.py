"""Golden numbers of one prior update. After a change meant to alter them: `python tests/golden/make_prior.py`."""

from __future__ import annotations

import json
import pathlib

import flax.linen as nn
import jax
import numpy as np
import optax

from dalle_jax.layout import TokenLayout
from dalle_jax.models.transformer import TransformerOptions
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior

PATH = pathlib.Path(__file__).with_name("prior.json")


def measure() -> dict[str, dict[str, float]]:
    """Loss and scalars of a small prior on seeded tokens, before and after one Adam update."""
    layout = TokenLayout(text_vocab=12, image_vocab=16, text_length=5, height=3, width=4)
    trunk = TransformerOptions(width=16, depth=3, heads=2, dtype="float32")
    prior = AutoregressivePrior(layout, AutoregressiveOptions(trunk, kernel=3, caption_drop=0.25))
    rng = np.random.default_rng(0)
    text = np.stack([layout.pad_text(rng.integers(0, 12, n)) for n in (2, 5, 3, 4, 1, 0, 3, 2)])
    tokens = rng.integers(0, 16, (8, 12), dtype=np.int32)
    params = nn.meta.unbox(jax.jit(prior.init)(jax.random.key(0)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, opt_state, step):
        key = jax.random.fold_in(jax.random.key(1), step)
        loss = lambda p: prior.loss(p, text, tokens, key, train=True)  # noqa: E731
        (loss, scalars), grads = jax.value_and_grad(loss, has_aux=True)(params)
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
