"""The training loop, for every task.

    from dalle_jax.training.loop import train
    state = train(config, "runs/prior-shapes")

The loop has one rhythm: evaluate → save → next batch → step.  A checkpoint thus holds the state and the data iterator
at the same boundary, with the measures of exactly that state.

Host and device meet in named places only: `report`, which waits for step n when n + 1 is already queued, and the
cadenced work (evaluation, preview, checkpoint), before which everything queued is reported.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax import compilation_cache, keys
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.compatibility import to_json
from dalle_jax.checkpoints.workdir import read_config
from dalle_jax.configuration.options import from_config
from dalle_jax.data.prefetch import prefetch_to_mesh
from dalle_jax.data.timeout_iterator import Patient
from dalle_jax.distributed.mesh import describe, make_mesh
from dalle_jax.distributed.rows import check_batch, host_rows, to_mesh
from dalle_jax.distributed.sharding import batch_sharding, on_mesh, replicated
from dalle_jax.distributed.turns import first_host_first, is_first, joined
from dalle_jax.distributed.watchdog import Watchdog, lost_host
from dalle_jax.errors import ConfigError, DataError, LostHostError, NonFiniteError, Preempted, UserError
from dalle_jax.metrics.mean import Mean
from dalle_jax.optim import optimizers, schedules
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.reporting.metric_writer import MetricWriter
from dalle_jax.reporting.progress import Progress
from dalle_jax.storage.files import full_path, make_workdir, write_json
from dalle_jax.tasks.registry import build, defaults
from dalle_jax.tasks.task import Job
from dalle_jax.training.profiling import StepClock, StepTrace, check_profile_steps
from dalle_jax.training.signals import stop_signals
from dalle_jax.training.step import TrainState, make_init, make_train_step
from dalle_jax.training.warm_start import warm_start

_LONGEST = 1e9  # seconds: what Python can wait is not much more


def train(config: ConfigDict, workdir: str, job: Job | None = None) -> TrainState:
    """Trains until `config.steps`, from the latest checkpoint in `workdir` if there is one.

    May be called several times in one process.  On SIGTERM or Ctrl-C it saves and raises `Preempted`; the same call
    then goes on from there, with the same numbers as if nothing had happened.

    Args:
      config: a training configuration (see `configs/`).
      workdir: directory of the run; made if needed.
      job: what to train; default: `build` of `config` and `workdir`.

    Returns:
      The final state, on the mesh.

    Raises:
      UserError: its subclasses say what was wrong with configuration, data, mesh, checkpoints or numbers.
    """
    with _lost_hosts(), contextlib.ExitStack() as cleanup:
        # --------------------------------------------------------------------------------------- what to run, where
        compilation_cache.enable()
        mesh, options, average = check(config)
        workdir = _make(workdir)
        stop = cleanup.enter_context(stop_signals())
        total, cadence = config.steps, config.cadence
        job = job or build(config, workdir, host_rows(mesh, config.batch_size))
        task = job.task
        step_schedules = {
            **task.schedules,
            "learning_rate": schedules.make(config.schedules.learning_rate, "learning_rate"),
        }
        optimizer = optimizers.make_optimizer(options)
        logging.info("mesh: %s", describe(mesh))

        # ------------------------------------------------------------ the state: shapes, their layout, then either
        #   1. the latest checkpoint in workdir (state and data iterator), whatever mesh it was written on, or
        #   2. fresh parameters, or those of config.start_from where they fit
        cleanup.enter_context(on_mesh(mesh))
        watchdog = cleanup.enter_context(Watchdog(config.timeout_seconds.step))
        init, abstract_state = make_init(task, optimizer, average, mesh, config.seed)
        rows, everywhere = batch_sharding(mesh), replicated(mesh)
        batches = prefetch_to_mesh(Patient(job.train_batches(), config.timeout_seconds.data), rows)
        cleanup.push(_closing(batches.close))
        checkpoints = Checkpoints(
            workdir, keep_last=config.keep.last, keep_best=config.keep.best, best_metric=task.best_metric
        )
        cleanup.push(_closing(checkpoints.close))
        if checkpoints.latest_step is not None:
            state = checkpoints.restore(abstract_state, batches, config, defaults(config))
        else:
            state = init()
            if config.get("start_from"):
                state = warm_start(state, config.start_from)
        start = int(state.step)
        if is_first() and (start <= total or not _has_config(workdir)):  # else the longer training's stays
            write_json(epath.Path(workdir) / "config.json", to_json(config))

        # ------------------------------------------------------------------------------------ what the run reports
        writer, mean, progress = MetricWriter(workdir, start=start), Mean(), Progress(start, total, config.batch_size)
        cleanup.push(_closing(writer.close))
        clock, compiled = StepClock(start), {}
        trace = StepTrace(workdir, start=start, total=total, count=config.profile_steps)
        cleanup.push(_closing(trace.close))
        if start:
            progress.note(f"{workdir}: {'going on from' if start < total else 'complete:'} step {start} of {total}")
        queued: list[tuple[int, dict[str, jax.Array]]] = []  # steps on their way, whose scalars were not fetched yet

        def report(keep: int) -> None:
            """Fetches and logs the scalars of all queued steps but the latest `keep`."""
            while len(queued) > keep:
                step, scalars = queued.pop(0)
                with clock.part("device"):
                    host = {name: float(value) for name, value in jax.device_get(scalars).items()}
                if host["skipped_in_row"] >= config.max_nonfinite:
                    raise NonFiniteError(
                        f"Loss or gradients were not finite in {host['skipped_in_row']:.0f} steps in a row (until step "
                        f"{step}); none of them changed the parameters. The last checkpoint, of step "
                        f"{checkpoints.latest_step}, is good. Lower schedules.learning_rate or optimizer.clip_norm."
                    )
                del host["skipped_in_row"]
                mean.add(host)
                progress.show(step, host["loss"])
                watchdog.gets_on()
                if step % cadence.log == 0 or step == total:
                    left_out = {f"left_out/{reason}": n for reason, n in job.data_counts().items()}
                    now = {name: host[name] for name in (*step_schedules, "skipped")}
                    rates = progress.rates(step)
                    times = {**clock.take(step, rates["seconds_per_step"]), **compiled}
                    values = {**mean.take(), **now, **rates, **times, **left_out}
                    writer.scalars(step, {f"train/{name}": value for name, value in values.items()})
                    compiled.clear()

        # ------------------------------------------------------------------------------ what it computes beside steps
        frozen = jax.device_put(task.frozen, everywhere)
        key = jax.device_put(jax.random.key(config.seed), everywhere)

        def evaluation_batches() -> Iterator[Any]:
            with contextlib.closing(Patient(iter(job.eval_batches()), config.timeout_seconds.data)) as every:
                for batch in itertools.islice(every, config.eval_batches):
                    yield to_mesh(batch, rows)
                    watchdog.gets_on()

        @functools.partial(jax.profiler.annotate_function, name="evaluate")
        def evaluate(step: int) -> dict[str, float]:
            values = task.evaluate(state.eval_params, frozen, evaluation_batches(), keys.stream(key, "evaluate"))
            writer.scalars(step, {f"eval/{name}": value for name, value in values.items()})
            progress.note(f"step {step} · " + " · ".join(f"{name} {value:.4g}" for name, value in values.items()))
            return values

        @functools.partial(jax.profiler.annotate_function, name="preview")
        def preview(step: int) -> None:
            batch = next(evaluation_batches())
            writer.picture(step, "preview", task.preview(state.eval_params, frozen, batch, keys.stream(key, "preview")))

        def compile_update(batch: Any) -> Any:
            began = time.perf_counter()
            how = options, average, step_schedules, abstract_state, config.overlap_exchanges
            update = make_train_step(task, optimizer, *how)
            update = update.lower(state, frozen, batch, key).compile()
            compiled["seconds_compile"] = time.perf_counter() - began  # logged once, with the first steps
            size = sum(x.size for x in jax.tree.leaves(state.params))
            progress.note(f"{workdir}: {size:,} parameters, compiled in {compiled['seconds_compile']:.1f} s")
            return update

        # ------------------------------------------------------------------------------------------------- the loop
        update = None
        for step in range(start, total + 1):
            last, fresh = step == total, step > start
            stopping = stop.is_set() or checkpoints.reached_preemption(step)
            evaluating, previewing, saving = (
                fresh and (last or (every > 0 and step % every == 0))
                for every in (cadence.eval, cadence.preview, cadence.checkpoint)
            )
            profiling = trace.due(step)
            if stopping or evaluating or previewing or saving or profiling:
                report(keep=0)
                with progress.pause():
                    if profiling:
                        progress.note(trace.advance())
                    measures = evaluate(step) if evaluating and not stopping else None
                    if previewing and not stopping:
                        preview(step)
                    if saving or stopping:
                        writer.flush()
                        with jax.profiler.TraceAnnotation("checkpoint"):
                            checkpoints.save(step, state, batches, config, measures)
                        watchdog.gets_on()
            if stopping or last and stop.is_set():  # a training that follows this one is not to begin
                checkpoints.wait()
                message = f"{workdir}: stopped at step {step} of {total} and saved; the same command goes on from there"
                progress.note(message)
                raise Preempted(message)
            if last:
                break

            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                with clock.part("data"):
                    batch = _next(batches)
                if update is None:
                    with progress.pause():
                        update = compile_update(batch)
                with clock.part("dispatch"):
                    state, scalars = update(state, frozen, batch, key)
                queued.append((step + 1, scalars))
                report(keep=1)  # the step before this one, while this one runs

        checkpoints.wait()
        progress.finish(total, clock.shares())
        return state


def check(config: ConfigDict) -> tuple[Mesh, OptimizerOptions, AverageOptions]:
    """Refuses, before anything is made, values that no training can use.

    Returns:
      The mesh, and the options of optimizer and average.

    Raises:
      ConfigError: a value that is none, or an unknown key.
      MeshError: a mesh that does not fit the devices, or a batch that does not fit the mesh.
    """
    for name in ("batch_size", "steps", "max_nonfinite", "eval_batches", "cadence.log", "keep.last"):
        value = config
        for part in name.split("."):
            value = value[part]
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"config.{name}={value!r}: expected a whole number, at least 1.")
    for name, seconds in config.timeout_seconds.items():
        if not 0 < seconds <= _LONGEST:
            raise ConfigError(
                f"config.timeout_seconds.{name}={seconds!r}: expected seconds, more than 0 and at most {_LONGEST:g}."
            )
    if jax.process_count() > 1 and not joined():
        raise ConfigError(
            f"This is one of {jax.process_count()} hosts of a TPU slice, and was not joined to them: give "
            "--coordinator_address=auto on each."
        )
    check_profile_steps(config.profile_steps)
    for name, section in config.schedules.items():
        schedules.make(section, name)
    mesh = make_mesh(**config.mesh)
    options = from_config(OptimizerOptions, config.optimizer, "optimizer")
    average = from_config(AverageOptions, config.ema, "ema")
    check_batch(mesh, config.batch_size, options.accumulate_steps)
    return mesh, options, average


def _make(workdir: str) -> str:
    """Makes the directory, the first host alone; gives its full name."""
    if not workdir:
        raise ConfigError("No workdir: give --workdir=DIR or config.workdir, where the run keeps its files.")
    with first_host_first(f"the workdir {workdir}"):
        if is_first():
            return make_workdir(workdir)
        path = full_path(workdir)
        if not path.exists():
            raise ConfigError(
                f"{path}, which the first host made, is not there on this one: several hosts need a workdir "
                "that all of them see (a network file system, or gs://…)."
            )
        return str(path)


def _has_config(workdir: str) -> bool:
    try:
        return bool(read_config(workdir))
    except UserError:
        return False


def _closing(close: Callable[[], None]) -> Callable[..., None]:
    """An exit callback; what goes wrong while closing after an error would only hide that error."""

    def leave(_: Any, error: BaseException | None, __: Any) -> None:
        if error is not None and (lost_host(error) or not getattr(error, "unwinds", True)):
            return  # closing would wait for what does not come
        try:
            close()
        except UserError:
            if error is None:
                raise

    return leave


@contextlib.contextmanager
def _lost_hosts() -> Iterator[None]:
    """Context that says in plain words that another host is gone."""
    try:
        yield
    except Exception as error:
        if message := lost_host(error):
            raise LostHostError(message) from error
        raise


def _next(batches: Iterator[Any]) -> Any:
    try:
        return next(batches)
    except StopIteration:
        raise DataError("The training data ended; the training iterator is expected to repeat for ever.") from None
