"""One training step of the autoregressive prior: the step that `train.py` runs, forward, backward and AdamW.

Random weights and tokens, float32, batch 2. `row_column` has the paper's attention (row, column, row, row, …, the last
convolutional); `dense` is the same model with dense causal attention. No gradient clipping and no moving average, as
the peers.
"""

import sys

import _measure as m  # first: it limits the threads
import _prior
import jax
import numpy as np
import optax

from dalle_jax import optimizers, parallel, train_step
from dalle_jax.optimizers import AverageOptions, OptimizerOptions


class Task:
    """The prior's loss over precomputed tokens, as `train_step` wants it."""

    def __init__(self, prior):
        self.prior, self.frozen = prior, {}

    def init(self, key):
        return self.prior.init(key)

    def loss(self, params, frozen, batch, key, step):
        return self.prior.loss(params, batch["text"], batch["tokens"], key, train=True)


def run(attention: str, default_runs: int, runs: int, smoke: bool, batch: int = 2) -> dict:
    prior = _prior.build(smoke=smoke, attention=attention)
    layout = prior.layout
    task, options, average = Task(prior), OptimizerOptions(), AverageOptions()
    optimizer, mesh = optimizers.make_optimizer(options), parallel.make_mesh()
    schedules = {"learning_rate": optax.constant_schedule(3e-4)}
    rows = {
        "text": _prior.random_text(prior, batch),
        "tokens": np.random.default_rng(1).integers(0, layout.image_vocab, (batch, layout.image_length), np.int32),
    }
    with parallel.on_mesh(mesh):
        init, abstract = train_step.make_init(task, optimizer, average, mesh, seed=0)
        state, key = init(), jax.random.key(1)
        step = train_step.make_train_step(task, optimizer, options, average, schedules, abstract)
        program, compile_s = m.compiled(step, state, {}, rows, key)
        losses = []

        def once():
            nonlocal state
            state, scalars = program(state, {}, rows, key)
            losses.append(scalars["loss"])
            return scalars["loss"]

        line = m.measure(once, runs or default_runs, warmup=2)
        memory = program.memory_analysis()
    tokens = batch * layout.length
    return line | {
        "compile_s": round(compile_s, 2),
        "tokens_per_step": tokens,
        "tokens_per_s": round(tokens / line["median_ms"] * 1e3, 1),
        "program_temporaries_mb": round(memory.temp_size_in_bytes / 2**20),
        "first_loss": round(float(losses[0]), 4),
        "last_loss": round(float(losses[-1]), 4),
        "params": m.count(state.params),
        "shape": _prior.shape(prior, batch),
    }


CASES = {
    "row_column_b2": lambda runs, smoke: run("sparse", 5, runs, smoke),
    "dense_b2": lambda runs, smoke: run("full", 3, runs, smoke),
}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
