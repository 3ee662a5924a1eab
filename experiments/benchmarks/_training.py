"""One training step, timed: the step that `train.py` runs, AdamW, no clipping, no moving average."""

from __future__ import annotations

import _measure as m  # first: it limits the threads
import jax
import optax

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import on_mesh
from dalle_jax.optim import optimizers
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.training import step as train_step


def time_step(task, batch: dict, schedules: dict, runs: int, **timing) -> dict:
    """The fields of a line: timing and memory, losses before and after, number of parameters.

    Args:
      task: what `train_step` trains.
      batch: numpy arrays, the same for every step.
      schedules: to log, the task's own.
      runs: number of times reported.
      **timing: `warmup` and `inner` of `_measure.measure`.
    """
    options, average = OptimizerOptions(), AverageOptions()
    optimizer, mesh = optimizers.make_optimizer(options), make_mesh()
    schedules = {"learning_rate": optax.constant_schedule(3e-4), **schedules}
    with on_mesh(mesh):
        init, abstract = train_step.make_init(task, optimizer, average, mesh, seed=0)
        state, key = init(), jax.random.key(1)
        step = train_step.make_train_step(task, optimizer, options, average, schedules, abstract)
        program, compile_s = m.compiled(step, state, {}, batch, key)
        losses = []

        def once():
            nonlocal state
            state, scalars = program(state, {}, batch, key)
            losses.append(scalars["loss"])
            return scalars["loss"]

        line = m.measure(once, runs, **timing)
    return line | {
        "compile_s": round(compile_s, 2),
        "program_temporaries_mb": round(program.memory_analysis().temp_size_in_bytes / 2**20),
        "first_loss": round(float(losses[0]), 4),
        "last_loss": round(float(losses[-1]), 4),
        "params": m.count(state.params),
    }
