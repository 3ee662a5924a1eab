"""One training run: its state, data and checkpoints, and the work that the loop asks of it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping
from typing import TextIO

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax import keys
from dalle_jax.checkpoints.best import BestMetric
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.compatibility import to_json
from dalle_jax.checkpoints.workdir import has_config
from dalle_jax.data.prefetch import prefetch_to_mesh
from dalle_jax.data.timeout_iterator import TimeoutIterator
from dalle_jax.distributed.rows import to_host, to_mesh
from dalle_jax.distributed.sharding import batch_sharding, replicated
from dalle_jax.distributed.turns import first_host_says, is_first
from dalle_jax.distributed.watchdog import Watchdog
from dalle_jax.errors import DataError, NonFiniteError
from dalle_jax.metrics.mean import Mean, without_empty
from dalle_jax.optim import optimizers, schedules
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.pytree import fingerprint
from dalle_jax.reporting.metric_writer import TENSORBOARD, MetricWriter, read_metrics
from dalle_jax.reporting.progress import Progress
from dalle_jax.reporting.units import with_unit
from dalle_jax.storage import checksummed
from dalle_jax.storage.files import write_json
from dalle_jax.tasks.registry import defaults
from dalle_jax.tasks.task import Batch, Job
from dalle_jax.training import expectations, nonfinite
from dalle_jax.training.changed_data import explain_changed_data
from dalle_jax.training.cleanup import close_at_exit
from dalle_jax.training.evaluations import Evaluations
from dalle_jax.training.profiling import StepClock, StepTrace
from dalle_jax.training.run_page import RunPage
from dalle_jax.training.step import Scalars, TrainState, frozen_shardings, make_init, make_train_step
from dalle_jax.training.summary import finished, news_in_words, summary
from dalle_jax.training.warm_start import warm_start

_MOST_UNREAD = 100  # steps whose scalars wait on the devices


class Run:
    """A training run: its state, data and checkpoints, and all that reports on them.

    Attributes:
      config, workdir, job: see `train`.
      start: number of steps done when this run was opened.
      total: number of steps at which it ends.
      state: the train state after the last step that was queued.
      skipped_in_row: number of latest updates that were skipped, after the last step that was reported.
      batches: the training iterator.
      checkpoints, writer, trace: of the workdir.
      progress, clock, mean: of the steps since the last report.
      page: `index.html` of the workdir.
      watchdog: is notified of progress.
      evaluations: all of the run, also those before an interruption.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        job: Job,
        mesh: Mesh,
        options: OptimizerOptions,
        average: AverageOptions,
        cleanup: contextlib.ExitStack,
        *,
        out: TextIO | None = None,
    ):
        """Restores or initialises the state and opens data and files, inside `on_mesh(mesh)`.

        Args:
          config: the training configuration.
          workdir: an existing directory.
          job: task and data.
          mesh: the devices.
          options: of the optimizer.
          average: of the moving average.
          cleanup: closes what the run opens.
          out: output of the progress, by default stdout.
        """
        task = job.task
        self.config, self.workdir, self.job, self.total = config, workdir, job, config.steps
        self.watchdog = cleanup.enter_context(Watchdog(config.timeout_seconds.step))
        learning_rate = schedules.make(config.schedules.learning_rate, "learning_rate")
        self._schedules = {**task.schedules, "learning_rate": learning_rate}
        self._optimizer, self._options, self._average = optimizers.make_optimizer(options), options, average
        init, self._abstract_state = make_init(task, self._optimizer, average, mesh, config.seed)
        self._rows, everywhere = batch_sharding(mesh), replicated(mesh)
        self.batches = prefetch_to_mesh(TimeoutIterator(job.train_batches(), config.timeout_seconds.data), self._rows)
        close_at_exit(cleanup, self.batches.close)
        self.checkpoints = Checkpoints(
            workdir, keep_last=config.keep.last, keep_best=config.keep.best, best_metric=task.best_metric
        )
        close_at_exit(cleanup, self.checkpoints.close)

        self._frozen_mark = fingerprint(task.frozen) if task.frozen else None

        # The state is, in order of precedence:
        #   1. the latest checkpoint in workdir (state and data iterator), written on any mesh
        #   2. fresh parameters, replaced by those of config.start_from where name and shape agree
        if self.checkpoints.latest_step is not None:
            with explain_changed_data(config, workdir, self.checkpoints):
                abstract = self._abstract_state.items()
                items = self.checkpoints.restore(abstract, self.batches, config, defaults(config), self._frozen_mark)
            self.state = TrainState.from_items(items)
        else:
            self.state = init()
            if config.get("start_from") and "base" not in task.frozen:  # adapters: it is their frozen base
                self.state = warm_start(self.state, config.start_from, workdir, config.task)
        start = self.start = int(self.state.step)
        self.skipped_in_row = int(self.state.skipped_in_row)
        if is_first() and (start <= self.total or not has_config(workdir)):  # else keep the longer training's file
            checksummed.write_json(epath.Path(workdir) / "config.json", to_json(config))

        lines = read_metrics(workdir) if is_first() else []
        evaluations = Evaluations.read(task.best_metric, lines, until=start).to_json()
        evaluations = first_host_says("evaluations", evaluations)
        self.evaluations = Evaluations.from_json(task.best_metric, evaluations)
        writers = config.get("metric_writers", TENSORBOARD)
        self.writer = MetricWriter(workdir, start=start, writers=writers, config=to_json(config))
        close_at_exit(cleanup, self.writer.close)
        self.trace = StepTrace(workdir, start=start, total=self.total, count=config.profile_steps)
        close_at_exit(cleanup, self.trace.close)
        self.progress = Progress(start, self.total, config.batch_size, out=out)
        cleanup.callback(self.progress.close)
        self.page = RunPage(config, workdir, job, self.writer, self.progress)
        self.clock, self.mean = StepClock(start), Mean()
        self._queued: list[tuple[int, Scalars]] = []  # steps that may still be running
        self._unread: list[tuple[int, Scalars]] = []  # steps that are done, and whose scalars were not fetched yet
        self._compile_seconds: dict[str, float] = {}  # until they are logged
        self._update: jax.stages.Compiled | None = None
        self._frozen = jax.device_put(task.frozen, frozen_shardings(task, mesh))
        self._key = jax.device_put(jax.random.key(config.seed), everywhere)

    def next_batch(self) -> Batch:
        """Returns the next training batch, on the mesh."""
        with self.clock.part("data"):
            try:
                return next(self.batches)
            except StopIteration:
                raise DataError("The training data ended; the training iterator must repeat forever.") from None

    def queue(self, step: int, batch: Batch) -> None:
        """Queues step number `step` on the device. The first call compiles the update."""
        if self._update is None:
            with self.progress.pause():
                self._update = self._compile(batch)
        with self.clock.part("dispatch"):
            self.state, scalars = self._update(self.state, self._frozen, batch, self._key)
        self._queued.append((step, scalars))

    def _compile(self, batch: Batch) -> jax.stages.Compiled:
        began = time.perf_counter()
        how = self._options, self._average, self._schedules, self._abstract_state, self.config.overlap_exchanges
        update = make_train_step(self.job.task, self._optimizer, *how)
        update = update.lower(self.state, self._frozen, batch, self._key).compile()
        seconds = self._compile_seconds["seconds_compile"] = time.perf_counter() - began
        size = sum(x.size for x in jax.tree.leaves(self.state.params))
        self.progress.note(f"{self.workdir}: {size:,} parameters, compiled in {seconds:.1f} s")
        self._advise(expectations.too_large(self.config, update))
        self._advise(expectations.seen_too_often(self.config, self.job.examples))
        return update

    def _advise(self, advice: str | None) -> None:
        if advice:
            self.progress.note(f"{self.workdir}: {advice}")

    def report(self, keep: int) -> None:
        """Waits for all queued steps except the latest `keep`.

        Their scalars are fetched when they are logged or shown, and otherwise after `max_nonfinite` steps. A run whose
        updates are skipped therefore ends at most that many steps late. With `keep` 0 they are fetched at once.
        """
        while len(self._queued) > keep:
            step, scalars = self._queued.pop(0)
            with self.clock.part("device"):
                scalars.wait()
            self._unread.append((step, scalars))
            self.watchdog.progress()
            logged = step % self.config.cadence.log == 0 or step == self.total
            many = len(self._unread) >= min(self.config.max_nonfinite, _MOST_UNREAD)
            if logged or many or self.progress.is_due(step):
                self._read()
            if (seconds := self.progress.predict(step)) is not None:
                self._advise(expectations.too_long(self.config, seconds))
        if not keep:
            self._read()

    def _read(self) -> None:
        """Fetches and reports the scalars of the steps that are done."""
        if not self._unread:
            return
        steps, scalars = [step for step, _ in self._unread], [scalars for _, scalars in self._unread]
        self._unread.clear()
        with self.clock.part("device"):
            fetched = Scalars.fetch(scalars)
        for step, values in zip(steps, fetched, strict=True):
            self.skipped_in_row = int(values.pop("skipped_in_row"))
            if self.skipped_in_row >= self.config.max_nonfinite:
                raise self._not_finite(step)
            self.mean.add(values)
            if step % self.config.cadence.log == 0 or step == self.total:
                self._log(step, values)
        self.progress.show(steps[-1], fetched[-1]["loss"])

    def check_parameters(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises NonFiniteError if the last update was skipped, and the evaluation finds no good parameters either."""
        if self.skipped_in_row and math.isinf(BestMetric.parse(self.job.task.best_metric).loss(metrics)):
            raise self._not_finite(step)

    def _not_finite(self, step: int) -> NonFiniteError:
        stored, directory = self.checkpoints.steps, self.checkpoints.directory
        return nonfinite.error(step, self.skipped_in_row, stored, directory, self._options.clip_norm)

    def resumes(self, step: int) -> str:
        """Says from which checkpoint the same command resumes a run that stops at step `step`."""
        saved = self.checkpoints.latest_step
        if saved == step:
            return "and saved; the same command resumes the run"
        where = "starts it again" if saved is None else f"resumes it from step {saved}"
        return f"among updates that are not finite; the same command {where}"

    def _log(self, step: int, values: dict[str, float]) -> None:
        """Writes the means since the last call, and the step's own schedules, times and counts."""
        now = {name: values[name] for name in (*self._schedules, "skipped")}
        counts = self.job.data_counts()
        rates = self.progress.rates(step)
        times = {**self.clock.take(step, rates["seconds_per_step"]), **self._compile_seconds}
        values = {**without_empty(self.mean.take()), **now, **rates, **times, **counts}
        self._write(step, "train", values)
        self._compile_seconds.clear()

    def _write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Writes the line of a training report or of an evaluation."""
        line = {f"{kind}/{name}": value for name, value in values.items()}
        self.writer.scalars(step, line)
        self.evaluations.add(step, line)

    def _evaluation_batches(self) -> Iterator[Batch]:
        batches = TimeoutIterator(iter(self.job.eval_batches()), self.config.timeout_seconds.data)
        with contextlib.closing(batches):
            for batch in itertools.islice(batches, self.config.eval_batches):
                yield to_mesh(batch, self._rows)
                self.watchdog.progress()

    @functools.partial(jax.profiler.annotate_function, name="evaluate")
    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluates the current state and reports its metrics."""
        key = keys.stream(self._key, "evaluate")
        metrics = self.job.task.evaluate(self.state.eval_params, self._frozen, self._evaluation_batches(), key)
        self._write(step, "eval", metrics)
        said = " · ".join(f"{name} {with_unit(name, value)}" for name, value in metrics.items())
        self.progress.note(f"eval · step {step}/{self.total} · {said}")
        news = news_in_words(self.evaluations, self.job.task, self.config)
        if news and not self.ended_early:  # the summary says it too
            self.progress.note(news)
        return metrics

    @property
    def ended_early(self) -> bool:
        """Whether validation stands still for as long as `config.stop_after` allows."""
        return self.evaluations.stops(self.config.get("stop_after", 0))

    def keeps_best(self, step: int) -> bool:
        """Returns whether the evaluation of step `step` is the best so far and `config.keep.best` asks to keep it."""
        best = self.evaluations.best
        return self.config.keep.best > 0 and best is not None and best.step == step

    @functools.partial(jax.profiler.annotate_function, name="preview")
    def preview(self, step: int) -> None:
        """Writes the task's preview image of the current state, unless no held-out example is readable."""
        if self.job.preview_batch is None:
            batch = next(self._evaluation_batches())
        else:
            batch = to_mesh(self.job.preview_batch(), self._rows)
        if not to_host({"valid": batch["valid"]})["valid"].any():
            return
        key = keys.stream(self._key, "preview")
        image = self.job.task.preview(self.state.eval_params, self._frozen, batch, key)
        self.writer.image(step, "preview", image)

    def save(self, step: int, metrics: dict[str, float] | None) -> None:
        """Flushes the reports and starts to write a checkpoint of the current state."""
        self.writer.flush()
        with jax.profiler.TraceAnnotation("checkpoint"):
            self.checkpoints.save(step, self.state.items(), self.batches, self.config, metrics, self._frozen_mark)
        self.watchdog.progress()

    def finish(self, step: int) -> None:
        """Reports the end of the run at step `step`: the summary, and `finished.json`."""
        self.progress.finish(step, self.clock.shares())
        if not is_first():
            return
        task, config = self.job.task, self.config
        write_json(epath.Path(self.workdir) / "finished.json", finished(self.evaluations, step, self.total))
        best = self.evaluations.best
        stored = best is not None and best.step < step and best.step in self.checkpoints.steps
        batch = self.job.preview_batch() if self.job.preview_batch else {}
        flags = ["--config.step=best"] if stored else []
        lines = summary(
            task,
            self.evaluations,
            config,
            workdir=self.workdir,
            step=step,
            total=self.total,
            parameters=sum(x.size for x in jax.tree.leaves(self.state.params)),
            batch_size=config.batch_size,
            examples=self.job.examples,
            evaluated=min(self.job.held_out, config.eval_batches * config.batch_size),
            stop_after=config.get("stop_after", 0),
            next_steps=task.next_steps(config, self.workdir, batch, flags),
        )
        self.progress.note(lines)
        self.page.write(step, lines)
