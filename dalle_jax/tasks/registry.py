"""Tasks by name: builds the job, or the task without data, of a training configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from dalle_jax.configuration.options import defaults_of
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.tasks import beit, clip, dvae, prior, vq, vqgan
from dalle_jax.tasks.task import Batch, Job, Task

# config.task → the module with its `build` and `abstract`.
TASKS = {"beit": beit, "clip": clip, "dvae": dvae, "prior": prior, "vq": vq, "vqgan": vqgan}


def build(config: ConfigDict, workdir: str, rows: Sequence[int] | None = None) -> Job:
    """Builds the job of a training configuration.

    Args:
      config: a training configuration; `config.task` selects the task.
      workdir: workdir of the run. A job may store there what the model needs later, such as its text model.
      rows: rows of each batch that this host reads (`rows.host_rows`); None for all.

    Raises:
      ConfigError: an unknown task.
    """
    return _module(config).build(config, workdir, rows)


def abstract(config: ConfigDict, tokenizer: ImageTokenizer | None = None) -> tuple[Task, Batch]:
    """Builds the task of a configuration without its data: all that the program of its train step depends on.

    Sizes that training reads from its data are read from the configuration here. The text model has
    `config.text.vocab_size` ids, and the image tokenizer is that of `config.tokenizer`. `frozen` holds zeros.

    Args:
      config: a training configuration.
      tokenizer: the image tokenizer of a prior, if it is not that of `config.tokenizer`.

    Returns:
      The task, and a batch of `jax.ShapeDtypeStruct`s with B rows each, as its pipeline would deliver.

    Raises:
      ConfigError: an unknown task, or sizes that do not fit each other.
    """
    return _module(config).abstract(config, *([] if tokenizer is None else [tokenizer]))


def check_config(config: ConfigDict) -> None:
    """Checks the sections of a training configuration that its task reads, without data and without a workdir.

    Raises:
      ConfigError: an unknown task or key, or an invalid value.
    """
    _module(config).check_config(config)


def options(config: Mapping[str, Any]) -> dict[str, type]:
    """Returns the options dataclass behind each section of a training configuration, by dotted name.

    Raises:
      ConfigError: no such prior.
    """
    found = {"data": DataOptions, "optimizer": OptimizerOptions, "ema": AverageOptions}
    return found | (TASKS[config["task"]].options(config) if config["task"] in TASKS else {})


def defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the default of every key in the sections of `options`, and of newer top keys, by dotted name.

    A configuration that an older version stored lacks the newer keys. Its run used their defaults.
    """
    return {"stop_after": 0, "metric_writers": "tensorboard", "preview.captions": ""} | {
        f"{section}.{name}": value
        for section, cls in options(config).items()
        for name, value in defaults_of(cls).items()
    }


def _module(config: ConfigDict) -> ModuleType:
    if config.task not in TASKS:
        raise ConfigError(f"config.task={config.task!r}: expected one of {', '.join(TASKS)}.")
    return TASKS[config.task]
