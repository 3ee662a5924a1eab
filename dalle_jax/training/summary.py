"""The summary of a finished training for people, and `finished.json` for programs."""

from __future__ import annotations

from collections.abc import Sequence

from ml_collections import ConfigDict

from dalle_jax.checkpoints import checksums
from dalle_jax.reporting.progress import duration
from dalle_jax.reporting.units import with_unit
from dalle_jax.tasks.task import Task
from dalle_jax.training.evaluations import PATIENCE, Evaluation, Evaluations

# Augmentation of the images by task; see `data.augment`.
_AUGMENTATIONS = {"dvae": "dvae", "vq": "dvae", "vqgan": "dvae", "beit": "dvae", "prior": "prior", "clip": "clip"}
_DROPOUT = 0.15  # measured on clip art, experiments/results/own_images


def news_in_words(evaluations: Evaluations, task: Task, config: ConfigDict) -> str | None:
    """Says that validation stands still or that the model overfits, once in a run; None if there is no such news."""
    news = evaluations.news()
    best, last = evaluations.best, evaluations.last
    if news is None or best is None:
        return None
    values = f"validation was best at step {best.step:,} ({_value(best, evaluations)})"
    if news == "overfits":
        return (
            f"step {last.step} · {values} and is {_value(last, evaluations)} now, while the training loss still falls: "
            f"it is learning its {task.studies} by heart. More examples help most.{_delaying(config)} "
            "--config.stop_after=N stops such a training, and --config.keep.best=1 keeps its best checkpoint."
        )
    return (
        f"step {last.step} · {values} and has not improved in {evaluations.without_improvement} evaluations. "
        "--config.stop_after=N stops a training that stands still."
    )


def _delaying(config: ConfigDict) -> str:
    """Names the keys that delay overfitting and are not set, as a sentence; "" if there are none."""
    flags = []
    if config.get("task") not in _AUGMENTATIONS:
        return ""
    if config.data.augment == "none":
        flags.append(f"--config.data.augment={_AUGMENTATIONS[config.task]}")
        if config.get("data_tokens", "each_batch") != "each_batch":
            flags.append("--config.data_tokens=each_batch")
    trunk = config.model.get("trunk")
    if trunk is not None and not trunk.dropout:
        flags.append(f"--config.model.trunk.dropout={_DROPOUT}")
    return f" In a new workdir, {' '.join(flags)} would delay it." if flags else ""


def verdict(evaluations: Evaluations, task: Task, config: ConfigDict, step: int, total: int) -> list[str]:
    """Says how validation went: best and last value, and what follows from them.

    Args:
      evaluations: all of the run.
      task: its task.
      config: its configuration.
      step: the last step.
      total: `config.steps`.
    """
    best, last = evaluations.best, evaluations.last
    if last is None:
        return []
    if best is None:
        return [f"validation: {evaluations.metric.name} was never a number; lower schedules.learning_rate"]
    if len(evaluations.done) == 1:
        return [f"validation at step {best.step:,}: {_value(best, evaluations)} (the only evaluation)"]
    values = f"validation was best at step {best.step:,} of {total:,}: {_value(best, evaluations)}"
    if last is not best:
        values += f"; at step {last.step:,} it was {_value(last, evaluations)}"
    if evaluations.overfits:
        return [f"{values}: it is learning its {task.studies} by heart.{_delaying(config)}"]
    if evaluations.without_improvement >= PATIENCE:
        return [f"{values}: it has stood still since, and a longer training would hardly help"]
    if step >= total and not evaluations.without_improvement:
        return [f"{values}: it was still improving, and a longer training may help (--config.steps={2 * total})"]
    return [values]


def summary(
    task: Task,
    evaluations: Evaluations,
    config: ConfigDict,
    *,
    workdir: str,
    step: int,
    total: int,
    parameters: int,
    batch_size: int,
    examples: int,
    evaluated: int,
    stop_after: int,
    next_steps: Sequence[str],
) -> str:
    """Returns the summary at the end of a training, several lines.

    Args:
      task: says what its metrics mean.
      evaluations: all of the run.
      config: its configuration.
      workdir: of the run.
      step: the last step.
      total: `config.steps`.
      parameters: number of trained parameters.
      batch_size: examples per step.
      examples: number of training examples; 0 if unknown.
      evaluated: number of examples of an evaluation.
      stop_after: `config.stop_after`.
      next_steps: lines that say how the model is used.
    """
    seen = f"{step:,} updates of {batch_size:,} examples"
    if examples:
        seen += f", {step * batch_size / examples:,.3g} epochs over {examples:,}"
    if evaluations.seconds:
        seen += f", in {duration(evaluations.seconds)} of training"
    head = f"{workdir}: {task.title}, {parameters:,} parameters, trained by {seen}"
    said = verdict(evaluations, task, config, step, total)
    if evaluations.stops(stop_after) and step < total:
        said.append(
            f"stopped at step {step:,} of {total:,} after {evaluations.without_improvement} evaluations without "
            f"improvement (stop_after={stop_after}); --config.stop_after=0 trains to the end"
        )
    if evaluations.last is not None:
        said += task.in_words(evaluations.last.metrics, evaluated)
    said.append(f"images: {workdir}/samples; metrics: {workdir}/metrics.jsonl, or tensorboard --logdir={workdir}")
    return "\n  ".join([head, *said, *next_steps])


def finished(evaluations: Evaluations, step: int, total: int) -> dict[str, object]:
    """Returns the content of `finished.json`, which `workdir.is_complete` reads.

    Returns:
      {"step", "steps", "without_improvement", "best", "last", "checksum"}: the last step, `config.steps`, the number of
      latest evaluations without improvement, the best and last evaluation as {"step", "metric", "value"} or None, and
      the checksum of all these.
    """

    def plain(evaluation: Evaluation | None) -> dict[str, object] | None:
        if evaluation is None:
            return None
        name = evaluations.metric.name
        return {"step": evaluation.step, "metric": name, "value": evaluation.metrics.get(name)}

    values = {
        "step": step,
        "steps": total,
        "without_improvement": evaluations.without_improvement,
        "best": plain(evaluations.best),
        "last": plain(evaluations.last),
    }
    return {**values, "checksum": checksums.of_json(values)}


def _value(evaluation: Evaluation, evaluations: Evaluations) -> str:
    name = evaluations.metric.name
    return f"{name} {with_unit(name, evaluation.metrics[name])}"
