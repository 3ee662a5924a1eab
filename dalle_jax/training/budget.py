"""`config.minutes`: fixes the number of updates so that a training ends in time on this machine.

The costs of a training are measured once at its start, with the real data and the real programs, in a throw-away run.
The number of updates that fits into the remaining time becomes `config.steps`, which the schedules follow. It is
written into the run's config.json. A resumed run reads it there and measures nothing, so its numbers do not depend on
the machine. They equal those of a run with `--config.steps=N`.

With `data.cache` the first pass over the data decodes images, and later passes do not. The throw-away run then trains
twice on the same batches from the middle of the first pass. The first time gives the cost of an update in this pass,
the second time that of all later ones. The plan assumes:

- The timed batches are like the others. Training shuffles, so they are a random sample of the split. If a few images
  are far larger than the rest and the time is short, the sample is small and the plan is rough.
- No other program makes the machine slower or faster later.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import time
from collections.abc import Callable

from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax import compilation_cache
from dalle_jax.checkpoints.workdir import has_config, latest_step, read_config
from dalle_jax.distributed.sharding import on_mesh
from dalle_jax.distributed.turns import first_host_says, is_first
from dalle_jax.errors import ConfigError
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.reporting.metric_writer import TENSORBOARD
from dalle_jax.reporting.progress import duration, until
from dalle_jax.tasks.task import Job
from dalle_jax.training.run import Run

LEAST_STEPS = 10  # a training of fewer updates is not worth its compilation
_MOST_STEPS = 10**9
_PROVISIONAL_STEPS = 10_000  # of the schedules while the costs are measured
_WARM_UP = 3  # the first updates also fill queues and caches
_TIMED_STEPS = 5  # the fewest
_SHARE = 0.02  # of the budget, for timing updates; half as much for those on the same batches again
_LONGEST_WINDOW = 20.0  # seconds
_REPEATED = 0.1  # of the budget: work that takes less is timed twice, because its first time compiles
_FOLDER = "timing"  # of the throw-away run, inside the workdir


@dataclasses.dataclass(frozen=True)
class Costs:
    """Measured costs of a training, in seconds.

    Attributes:
      start: building the job, initialising the state, compiling, and the first update.
      step: one update after the first pass over the data.
      evaluation, preview, checkpoint: one of them.
      first_read: what an update of the first pass takes in addition.
      first_pass: number of updates in the first pass.
    """

    start: float
    step: float
    evaluation: float
    preview: float
    checkpoint: float
    first_read: float = 0.0
    first_pass: int = 0

    def besides(self, config: ConfigDict) -> float:
        """Returns the seconds that a run of `config.steps` updates takes in addition to `start` and its `step`s.

        They are those of evaluations, previews, checkpoints, and of reading in the first pass.
        """
        counts = (_events(config.steps, config.cadence[name]) for name in ("eval", "preview", "checkpoint"))
        pauses = sum(n * cost for n, cost in zip(counts, (self.evaluation, self.preview, self.checkpoint)))
        return pauses + min(config.steps, self.first_pass) * self.first_read

    def whole(self, config: ConfigDict) -> float:
        """Returns the seconds of a run of `config.steps` updates."""
        return self.start + config.steps * self.step + self.besides(config)


def _events(steps: int, every: int) -> int:
    """Returns how often work at a cadence happens. The last step always does it."""
    return -(-steps // every) if every > 0 else 1


def with_steps(config: ConfigDict, steps: int | None) -> ConfigDict:
    """Returns a copy of a configuration with other `steps`, None to leave them open. Schedules and cadence follow."""
    changed = copy.deepcopy(config)  # a copy that keeps the references between keys
    changed.steps = steps
    return changed


def fixed_steps(config: ConfigDict, workdir: str) -> int | None:
    """Returns the number of updates that the run in `workdir` is fixed to, or None if it is to be planned.

    A run with a checkpoint is fixed. So is a run without one whose config.json was planned for the same minutes. Every
    host must call this equally often.

    Args:
      config: a training configuration. Without `minutes` the result is None.
      workdir: directory of the run. It may not exist.
    """
    if config.get("minutes") is None:
        return None
    return first_host_says("planned steps", _stored_steps(config, workdir) if is_first() else None)


def _stored_steps(config: ConfigDict, workdir: str) -> int | None:
    if not has_config(workdir):
        return None
    stored = read_config(workdir)
    return stored["steps"] if stored.get("minutes") == config.minutes or latest_step(workdir) is not None else None


def opened(config: ConfigDict, workdir: str) -> ConfigDict:
    """Returns a copy of a configuration whose `steps` are those of the run in `workdir`, or None if to be planned.

    Without `minutes` the copy is unchanged. Every host must call this equally often.
    """
    if config.get("minutes") is None:
        return copy.deepcopy(config)
    return with_steps(config, fixed_steps(config, workdir))


def provisional(config: ConfigDict) -> ConfigDict:
    """Returns a configuration with some number of updates, to be checked and timed before `steps` are planned."""
    return config if config.get("minutes") is None else with_steps(config, _PROVISIONAL_STEPS)


def settle(
    config: ConfigDict,
    workdir: str,
    make_job: Callable[[ConfigDict], Job],
    mesh: Mesh,
    options: OptimizerOptions,
    average: AverageOptions,
    began: float,
) -> tuple[ConfigDict, Costs | None]:
    """Fixes the number of updates: that of the existing run, or else by measuring.

    Args:
      config: a training configuration with `minutes`.
      workdir: an existing directory.
      make_job: builds task and data of a configuration.
      mesh, options, average: see `validate`.
      began: the `time.perf_counter()` at which the minutes began.

    Returns:
      The configuration with its `steps`, and the measured costs, None for an existing run.

    Raises:
      ConfigError: fewer than `LEAST_STEPS` updates fit.
    """
    fixed = fixed_steps(config, workdir)
    if fixed is not None:
        planned = read_config(workdir).get("minutes")
        how = "was not planned by minutes" if planned is None else f"was planned for {planned:g} minutes"
        remedy = "" if planned == config.minutes else " To plan again, give a new --workdir=DIR."
        logging.info("%s %s: it ends at step %d, on any machine.%s", workdir, how, fixed, remedy)
        return with_steps(config, fixed), None
    trial = provisional(config)
    began_build = time.perf_counter()
    job = make_job(trial)
    building = time.perf_counter() - began_build
    with on_mesh(mesh):
        costs = measure(trial, workdir, job, mesh, options, average)
    costs = dataclasses.replace(costs, start=building + costs.start)  # the job is built once more for the run
    costs = Costs(**first_host_says("costs of the training", dataclasses.asdict(costs)))
    return plan(config, workdir, costs, first_host_says("seconds passed", time.perf_counter() - began)), costs


def plan(config: ConfigDict, workdir: str, costs: Costs, passed: float) -> ConfigDict:
    """Returns the configuration with the number of updates that fit into its minutes.

    Args:
      config: a training configuration with `minutes`.
      workdir: for messages.
      costs: of the training.
      passed: seconds of the minutes that have passed.

    Raises:
      ConfigError: fewer than `LEAST_STEPS` updates fit.
    """
    left = 60 * config.minutes - passed
    steps = most_steps(config, costs, left)
    first = f" (the first {costs.first_pass:,}: {costs.step + costs.first_read:.3g} s)" if costs.first_read else ""
    parts = f"start {costs.start:.1f} s, step {costs.step:.3g} s{first}, evaluation {costs.evaluation:.1f} s, "
    parts += f"preview {costs.preview:.1f} s, checkpoint {costs.checkpoint:.1f} s"
    if steps < LEAST_STEPS:
        needed = (passed + costs.whole(with_steps(config, LEAST_STEPS))) / 60
        raise ConfigError(
            f"config.minutes={config.minutes:g} is too short for {workdir}: {duration(passed)} have passed, and fewer "
            f"than {LEAST_STEPS} updates fit into the rest ({parts}). This training needs at least {1.05 * needed:.2g} "
            "minutes: give a larger --config.minutes=M. The tokenizer of a prior gets its own share: "
            "--config.tokenizer.minutes=M."
        )
    logging.info("%s: measured %s", workdir, parts)
    logging.info("%s: %d steps fit into %g minutes%s", workdir, steps, config.minutes, until(left))
    return with_steps(config, steps)


def compared(config: ConfigDict, workdir: str, began: float) -> str:
    """Returns a line with the planned and the real time, for the end of a run."""
    return f"{workdir}: planned {duration(60 * config.minutes)}, took {duration(time.perf_counter() - began)}"


def most_steps(config: ConfigDict, costs: Costs, seconds: float) -> int:
    """Returns the largest number of updates whose run ends within `seconds`; 0 if there is none."""
    trial = copy.deepcopy(config)

    def fits(steps: int) -> bool:
        trial.steps = steps
        return costs.whole(trial) <= seconds

    most = 0
    for bit in reversed(range(_MOST_STEPS.bit_length())):
        if fits(most + (1 << bit)):
            most += 1 << bit
    return most


def measure(
    config: ConfigDict, workdir: str, job: Job, mesh: Mesh, options: OptimizerOptions, average: AverageOptions
) -> Costs:
    """Measures the costs of a training in a throw-away run in a folder of `workdir`, which is removed again.

    Args:
      config: a training configuration whose `steps` are not reached.
      workdir: an existing directory.
      job: task and data.
      mesh, options, average: see `validate`. Call it inside `on_mesh(mesh)`.
    """
    folder = epath.Path(workdir) / _FOLDER
    _remove(folder)
    config = copy.deepcopy(config)
    with config.unlocked():
        config.profile_steps, config.metric_writers = 0, TENSORBOARD  # no run elsewhere
    if config.get("start_from"):
        config.start_from = None  # the costs do not depend on the values of the parameters
    budget = 60 * config.minutes
    first_pass, until = -(-job.examples // config.batch_size), _PROVISIONAL_STEPS // 2
    if cached := bool(config.data.get("cache")) and first_pass > 0:
        # Images of the first batches may be in memory, because some tokenizers start from them.
        job = dataclasses.replace(job, train_batches=functools.partial(job.train_batches, first_pass // 2))
        until = first_pass - first_pass // 2
    try:
        if is_first():
            folder.mkdir(parents=True)
        first_host_says("the folder for timing exists", True)
        with contextlib.ExitStack() as cleanup:
            began = time.perf_counter()
            run = Run(config, str(folder), job, mesh, options, average, cleanup, out=io.StringIO())
            beginning = run.batches.get_state()
            with compilation_cache.turned_off():  # the real update has other constants, so it is never cached
                _advance(run, 0, 1)
            start = time.perf_counter() - began
            _advance(run, 1, _WARM_UP)
            window = min(_SHARE * budget, _LONGEST_WINDOW)
            done, first = _timed(run, 1 + _WARM_UP, window, until=until)
            step = first
            if cached:
                run.batches.set_state(beginning)  # all batches so far are in memory now
                _advance(run, done, _WARM_UP)
                done, step = _timed(run, done + _WARM_UP, window / 2, until=2 * done)
            evaluation = _settled(lambda: run.evaluate(done), budget)
            preview = _settled(lambda: run.preview(done), budget)

            def save() -> None:
                run.save(done, None)
                run.checkpoints.wait()

            return Costs(start, step, evaluation, preview, _seconds(save), max(first - step, 0.0), first_pass)
    finally:
        _remove(folder)


def _advance(run: Run, done: int, count: int) -> float:
    """Trains `count` steps after `done` steps as the training loop does, and returns the seconds they took."""
    began = time.perf_counter()
    for step in range(done + 1, done + count + 1):
        run.queue(step, run.next_batch())
        run.report(keep=1)
    run.report(keep=0)
    return time.perf_counter() - began


def _timed(run: Run, done: int, window: float, *, until: int) -> tuple[int, float]:
    """Trains for about `window` seconds after `done` steps, and at least five steps.

    Steps are added as long as time is left, so that a few slow ones in the beginning do not decide alone.

    Args:
      run: the throw-away run.
      done: number of steps done.
      window: seconds.
      until: step at which it ends at the latest, if it has trained five.

    Returns:
      The number of steps done, and the mean seconds of a step.
    """
    count, seconds, more = 0, 0.0, _TIMED_STEPS
    while more > 0:
        seconds += _advance(run, done + count, more)
        count += more
        fitting = count * (window - seconds) / max(seconds, 1e-6)
        more = first_host_says("timed steps", int(min(fitting, count, until - done - count)))
    return done + count, seconds / count


def _settled(work: Callable[[], object], budget: float) -> float:
    """Returns the seconds of some work without compiling: of its second time, unless the first took too long."""
    first = _seconds(work)
    again = first_host_says("time it again", first < _REPEATED * budget)
    return _seconds(work) if again else first


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _remove(folder: epath.Path) -> None:
    """Removes the folder of an earlier or of this measurement."""
    if is_first() and folder.exists():
        folder.rmtree()
