"""The evaluations of a run so far: where validation was best, since when it stands still, and when to stop.

All of it is a pure function of the lines of `metrics.jsonl`. A resumed run therefore decides as an uninterrupted one.
The decision to stop depends on evaluations only, because the means of the training loss depend on interruptions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

from ml_collections import ConfigDict

from dalle_jax.checkpoints.best import BestMetric
from dalle_jax.configuration.values import natural
from dalle_jax.errors import ConfigError

TOLERANCE = 1e-3  # relative change of a metric that counts as an improvement
PATIENCE = 3  # evaluations without improvement after which validation stands still
_RISE = 1e-2  # relative change above the best value that counts as worse


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
      step: number of steps done.
      metrics: values by name.
      train_loss: mean training loss since the evaluation before; NaN if none was logged.
    """

    step: int
    metrics: Mapping[str, float]
    train_loss: float


def check_stop_after(config: ConfigDict) -> None:
    """Raises ConfigError if `config.stop_after` is not a number of evaluations, or if none would take place."""
    patience = config.get("stop_after", 0)
    natural("config.stop_after", patience)
    if patience and config.cadence.eval < 1:
        raise ConfigError(
            f"config.stop_after={patience} counts evaluations, but config.cadence.eval={config.cadence.eval} allows "
            "none before the last step. Give --config.cadence.eval=N, the number of steps between them."
        )


class Evaluations:
    """The evaluations of a run in order.

    Attributes:
      metric: the task's best metric.
      done: the evaluations, earliest first.
      seconds: duration of all logged steps, in seconds.
    """

    def __init__(self, best_metric: str):
        """Starts without evaluations. `best_metric` is that of the task."""
        self.metric, self.done, self.seconds = BestMetric.parse(best_metric), [], 0.0
        self._losses: list[float] = []  # logged since the last evaluation
        self._logged = 0  # step of the last logged line

    @classmethod
    def read(cls, best_metric: str, lines: Iterable[Mapping[str, Any]], until: int) -> Self:
        """Reads lines of `metrics.jsonl` up to step `until`."""
        found = cls(best_metric)
        for line in lines:
            if line["step"] <= until:
                found.add(line["step"], line)
        return found

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line of `metrics.jsonl`: values by name, "train/…" or "eval/…". None stands for NaN."""
        if isinstance(loss := values.get("train/loss"), (int, float)) and math.isfinite(loss):
            self._losses.append(float(loss))
        if seconds := values.get("train/seconds_per_step"):
            self.seconds += (step - self._logged) * seconds
            self._logged = step
        measured = {name[5:]: math.nan if x is None else float(x) for name, x in values.items() if name[:5] == "eval/"}
        if measured and not self.measured(step):
            mean = sum(self._losses) / len(self._losses) if self._losses else math.nan
            self.done.append(Evaluation(step, measured, mean))
            self._losses = []

    def to_json(self) -> list[Any]:
        """Returns everything as JSON values, for `from_json`."""
        done = [[each.step, dict(each.metrics), each.train_loss] for each in self.done]
        return [done, self.seconds, self._losses, self._logged]

    @classmethod
    def from_json(cls, best_metric: str, values: list[Any]) -> Self:
        """Returns what `to_json` described."""
        found = cls(best_metric)
        done, found.seconds, found._losses, found._logged = values
        found.done = [Evaluation(*each) for each in done]
        return found

    # -- questions ------------------------------------------------------------------------------------------------

    def measured(self, step: int) -> bool:
        """Returns whether step `step` was the last one to be evaluated."""
        return bool(self.done) and self.done[-1].step == step

    @property
    def last(self) -> Evaluation | None:
        """The latest evaluation, or None."""
        return self.done[-1] if self.done else None

    @property
    def best(self) -> Evaluation | None:
        """The evaluation with the best value, of equals the latest; None if no value is a number."""
        found = min(reversed(self.done), key=self._loss, default=None)
        return None if found is None or math.isinf(self._loss(found)) else found

    @property
    def without_improvement(self) -> int:
        """Number of latest evaluations in a row without an improvement of more than `TOLERANCE`."""
        return self._standstills()[-1] if self.done else 0

    def stops(self, patience: int) -> bool:
        """Returns whether the last `patience` evaluations brought no improvement; never for 0."""
        return 0 < patience <= self.without_improvement

    @property
    def overfits(self) -> bool:
        """Whether validation is worse than at its best step while the training loss has fallen since."""
        return bool(self.done) and self._overfits(len(self.done))

    def news(self) -> str | None:
        """Returns "overfits" or "stands still" if that is so at the latest evaluation, and was not said before.

        Validation stands still after `PATIENCE` evaluations without improvement. A rise counts from the second such
        evaluation on, because single values are noisy.
        """
        said: set[str] = set()
        state = None
        for number, standstill in enumerate(self._standstills(), 1):
            state = None
            if standstill >= 2 and self._overfits(number):
                state = "overfits"
            elif standstill >= PATIENCE:
                state = "stands still"
            if state in said or "overfits" in said:
                state = None
            said |= {state} - {None}
        return state

    def _overfits(self, number: int) -> bool:
        """Answers `overfits` after the first `number` evaluations."""
        done = self.done[:number]
        best, last = min(reversed(done), key=self._loss), done[-1]
        worse = self._loss(last) > _above(self._loss(best), _RISE)
        return worse and last.train_loss < _below(best.train_loss, TOLERANCE)

    def _loss(self, evaluation: Evaluation) -> float:
        return self.metric.loss(evaluation.metrics)

    def _standstills(self) -> list[int]:
        """Counts, for each evaluation, those in a row up to it without improvement."""
        counts, reference, count = [], math.inf, 0
        for evaluation in self.done:
            loss = self._loss(evaluation)
            if loss < _below(reference, TOLERANCE):
                reference, count = loss, 0
            else:
                count += 1
            counts.append(count)
        return counts


def _below(value: float, share: float) -> float:
    return value - share * abs(value) if math.isfinite(value) else value


def _above(value: float, share: float) -> float:
    return value + share * abs(value) if math.isfinite(value) else value
