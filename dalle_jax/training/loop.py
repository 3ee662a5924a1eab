"""The training loop of every task.

    from dalle_jax.training.loop import train
    state = train(config, "runs/prior-shapes")

The loop repeats evaluate → save → next batch → step. A checkpoint therefore holds the state and the data iterator at
the same step, with the metrics of exactly that state.

The host waits for the device in two places only. `Run.report` waits for step n while step n + 1 is already queued.
Work at a cadence (evaluation, preview, checkpoint) first reports everything that is queued. The scalars of a step stay
on the devices, as one array, until they are logged (`cadence.log`).
"""

from __future__ import annotations

import contextlib
import threading
import time

import jax
from absl import logging
from ml_collections import ConfigDict

from dalle_jax import compilation_cache
from dalle_jax.checkpoints.ownership import Lease, owned
from dalle_jax.data.sources.once import opened_once
from dalle_jax.distributed.mesh import describe
from dalle_jax.distributed.rows import host_rows
from dalle_jax.distributed.sharding import on_mesh
from dalle_jax.errors import Preempted
from dalle_jax.tasks.registry import build
from dalle_jax.tasks.task import Job
from dalle_jax.training import budget
from dalle_jax.training.cleanup import explain_lost_hosts
from dalle_jax.training.run import Run
from dalle_jax.training.signals import stop_signals
from dalle_jax.training.step import TrainState
from dalle_jax.training.validation import make_shared_workdir, validate


def train(config: ConfigDict, workdir: str, job: Job | None = None, *, began: float | None = None) -> TrainState:
    """Trains until `config.steps` or an early stop, starting from the latest checkpoint in `workdir` or from scratch.

    With `config.minutes` the number of steps is planned at the start of the run instead (`budget.py`).

    You may call it several times in one process. On SIGTERM or Ctrl-C it saves and raises `Preempted`. The same call
    then resumes the run, and its numbers are those of an uninterrupted run.

    Args:
      config: a training configuration (see `configs/`).
      workdir: local or remote directory of the run. It is created if it does not exist.
      job: task and data. The default is `build` of `config` and `workdir`.
      began: the `time.perf_counter()` at which `config.minutes` began; None for now.

    Returns:
      The final state, on the mesh.

    Raises:
      UserError: the configuration, data, mesh, checkpoints or numbers are invalid. Subclasses say which.
      Preempted: a signal stopped the training, and the state is saved.
    """
    with explain_lost_hosts(), contextlib.ExitStack() as cleanup:
        began = time.perf_counter() if began is None else began
        compilation_cache.enable()
        mesh, options, average = validate(budget.provisional(config))
        lease = cleanup.enter_context(owned(workdir))
        workdir = make_shared_workdir(workdir)
        stop = cleanup.enter_context(stop_signals())
        if mesh.size > 1:
            logging.info("mesh: %s", describe(mesh))
        rows, costs = host_rows(mesh, config.batch_size), None
        with opened_once():
            if config.get("minutes") is not None:
                how = mesh, options, average, began
                config, costs = budget.settle(config, workdir, lambda now: job or build(now, workdir, rows), *how)
            job = job or build(config, workdir, rows)
        cleanup.enter_context(on_mesh(mesh))
        run = Run(config, workdir, job, mesh, options, average, cleanup)
        if costs:
            run.progress.pauses = costs.besides(config)
        _advance(run, stop, lease)
        if costs:
            run.progress.note(budget.compared(config, workdir, began))
        return run.state


def _advance(run: Run, stop: threading.Event, lease: Lease | None) -> None:
    """Trains until the last step, or until validation stands still (`config.stop_after`).

    Evaluations and checkpoints that are due while updates are skipped take place after the next update that is finite.
    A checkpoint among skipped updates could hold parameters that no step size repairs. At the last step, the
    evaluation decides whether the parameters are good.

    Raises `Preempted` once `stop` is set and the state is saved, or while updates are skipped, and a `CheckpointError`
    if the workdir is lost.
    """
    cadence, start, total = run.config.cadence, run.start, run.total
    if start:
        complete = start >= total or run.ended_early
        run.progress.note(f"{run.workdir}: {'complete:' if complete else 'resuming from'} step {start} of {total}")
    late_evaluation = late_save = False
    for step in range(start, total + 1):
        last, fresh = step == total, step > start
        stopping = stop.is_set() or run.checkpoints.reached_preemption(step)
        evaluating, previewing, saving = (
            last or (every > 0 and step % every == 0) for every in (cadence.eval, cadence.preview, cadence.checkpoint)
        )
        evaluating = evaluating and step > 0 and not run.evaluations.measured(step)  # a signal may have come before it
        previewing, saving = previewing and fresh, saving and fresh
        evaluating, saving = evaluating or late_evaluation, saving or late_save
        profiling = run.trace.due(step)
        if stopping or evaluating or previewing or saving or profiling:
            run.report(keep=0)
            waiting = run.skipped_in_row > 0 and (stopping or not last)
            late_evaluation, late_save = evaluating and waiting, saving and waiting
            evaluating, saving = evaluating and not waiting, saving and not waiting
            if lease is not None:
                lease.check()
            with run.progress.pause():
                if profiling:
                    run.progress.note(run.trace.advance())
                metrics = run.evaluate(step) if evaluating and not stopping else None
                if metrics:
                    run.check_parameters(step, metrics)
                ending = fresh and run.ended_early
                if (previewing or ending) and not stopping:
                    run.preview(step)
                if (metrics or previewing) and not stopping:
                    run.page.write(step)
                if not waiting and (saving or stopping or ending or (metrics and run.keeps_best(step))):
                    run.save(step, metrics)
        last = last or run.ended_early
        if stopping or last and stop.is_set():  # do not start the next training after a stop signal
            run.checkpoints.wait()
            message = f"{run.workdir}: stopped at step {step} of {total} {run.resumes(step)}"
            run.progress.note(message)
            raise Preempted(message)
        if last:
            run.checkpoints.wait()
            run.finish(step)
            break

        with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
            run.queue(step + 1, run.next_batch())
            run.report(keep=1)  # the step before this one, while this one runs
