"""Tasks by `config.task`: builds the job or the abstract task of a training configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dalle_jax.configuration.options import defaults_of
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import ConfigError
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.tasks import clip, dvae, prior
from dalle_jax.tasks.task import Batch, Job, Task

# config.task → the module whose `build` and `abstract` make it.
TASKS = {"clip": clip, "dvae": dvae, "prior": prior}


def build(config: ConfigDict, workdir: str, rows: Sequence[int] | None = None) -> Job:
    """Builds the job that `config.task` names.

    Args:
      config: a training configuration.
      workdir: where the run writes; a job may put there what later needs it (a text model, a frozen tokenizer).
      rows: the rows of each batch that this host makes (`parallel.host_rows`); None: all.

    Raises:
      ConfigError: no such task.
    """
    return _module(config).build(config, workdir, rows)


def abstract(config: ConfigDict) -> tuple[Task, Batch]:
    """The task of a configuration without its data: all that its train step's program depends on.

    Sizes that training finds out from its data are taken from the configuration: the text model has
    `config.text.vocab_size` ids, the image tokenizer is the one of `config.tokenizer`. `frozen` holds zeros.

    Args:
      config: a training configuration.

    Returns:
      The task, and a batch of `jax.ShapeDtypeStruct`s as its pipeline would deliver, B rows of each.

    Raises:
      ConfigError: no such task, or sizes that do not fit each other.
    """
    return _module(config).abstract(config)


def options(config: Mapping[str, Any]) -> dict[str, type]:
    """Returns the options dataclass behind each section of a training configuration, by dotted name.

    Raises:
      ConfigError: no such prior.
    """
    found = {"data": DataOptions, "optimizer": OptimizerOptions, "ema": AverageOptions}
    return found | (TASKS[config["task"]].options(config) if config["task"] in TASKS else {})


def defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the default of every key in the sections of `options`, by dotted name.

    A configuration that an older version stored lacks the newer keys. Its run used their defaults.
    """
    return {
        f"{section}.{name}": value
        for section, cls in options(config).items()
        for name, value in defaults_of(cls).items()
    }


def _module(config: ConfigDict) -> Any:
    if config.task not in TASKS:
        raise ConfigError(f"config.task={config.task!r}: expected one of {', '.join(TASKS)}.")
    return TASKS[config.task]
