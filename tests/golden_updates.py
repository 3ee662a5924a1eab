"""Golden numbers: loss and scalars of a small model on seeded data, before and after one Adam update.

The numbers are stored in `golden/*.json`. `python tests/golden_updates.py` writes them again after an intended change.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import optax

from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.optim import schedules
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.tasks.dvae import DVAETask
from dalle_jax.token_layout import TokenLayout

FOLDER = pathlib.Path(__file__).with_name("golden")


def dvae() -> tuple[Callable, Callable]:
    """Returns `init(key)` and `loss(params, key, step)` of a small dVAE on images of coloured blocks."""
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
    return task.init, lambda params, key, step: task.loss(params, {}, batch, key, step)


LAYOUT = TokenLayout(Text(12, 5), image_vocab=16, height=3, width=4)
TRUNK = TransformerOptions(width=16, depth=3, heads=2, dtype="float32")


def prior() -> tuple[Callable, Callable]:
    """Returns the same of a small autoregressive prior on random captions and tokens."""
    return _prior(AutoregressivePrior(LAYOUT, AutoregressiveOptions(TRUNK, kernel=3, caption_drop=0.25)))


def maskgit() -> tuple[Callable, Callable]:
    """Returns the same of a small MaskGIT prior on the same captions and tokens."""
    return _prior(MaskGITPrior(LAYOUT, MaskGITOptions(TRUNK, caption_drop=0.25)))


def _prior(prior) -> tuple[Callable, Callable]:
    rng = np.random.default_rng(0)
    text = np.stack([LAYOUT.condition.pad(rng.integers(0, 12, n)) for n in (2, 5, 3, 4, 1, 0, 3, 2)])
    tokens = rng.integers(0, 16, (8, 12), dtype=np.int32)
    return prior.init, lambda params, key, step: prior.loss(params, text, tokens, key, train=True)


MODELS = {"dvae": dvae, "prior": prior, "maskgit": maskgit}


def measure(name: str) -> dict[str, dict[str, float]]:
    """Returns the scalars of one of `MODELS`, before and after the update."""
    init, loss = MODELS[name]()
    params = nn.meta.unbox(jax.jit(init)(jax.random.key(0)))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def update(params, opt_state, step):
        key = jax.random.fold_in(jax.random.key(1), step)
        (value, scalars), grads = jax.value_and_grad(loss, has_aux=True)(params, key, step)
        updates, opt_state = optimizer.update(grads, opt_state)
        scalars = {"loss": value, **scalars, "gradient_norm": optax.tree.norm(grads)}
        return optax.apply_updates(params, updates), opt_state, scalars

    opt_state, measured = optimizer.init(params), {}
    for step, moment in enumerate(("before", "after")):
        params, opt_state, scalars = update(params, opt_state, step)
        scalars = {key: float(value) for key, value in scalars.items()}
        measured[moment] = {
            key: value for key, value in scalars.items() if math.isfinite(value)
        }  # NaN: nothing to measure
    return measured


def check(name: str) -> None:
    """Checks `measure(name)` against its stored numbers."""
    golden, measured = json.loads((FOLDER / f"{name}.json").read_text()), measure(name)
    for moment, scalars in golden.items():
        assert scalars.keys() == measured[moment].keys()
        for key, value in scalars.items():
            np.testing.assert_allclose(measured[moment][key], value, rtol=1e-3, atol=1e-5, err_msg=f"{moment} {key}")


if __name__ == "__main__":
    for name in MODELS:
        (FOLDER / f"{name}.json").write_text(json.dumps(measure(name), indent=2) + "\n")
