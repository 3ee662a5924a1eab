"""Times a training step as training runs it: AdamW without clipping or EMA."""

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
    """Times the training step of a task.

    Args:
      task: the task to train.
      batch: numpy arrays, the same for every step.
      schedules: schedules of the task, to log.
      runs: number of reported times.
      **timing: `warmup` and `inner` of `_measure.measure`.

    Returns:
      Fields of the line: timing, memory, first and last loss, and number of parameters.
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
