"""A run in Weights & Biases (the package `wandb`), next to its own files.

The same workdir is the same run there, also after an interruption. `WANDB_MODE=offline` writes to `<workdir>/wandb`
without a network, and `wandb sync` uploads it later. The usual variables work: WANDB_PROJECT, WANDB_RUN_ID, …
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from dalle_jax.errors import ConfigError

PROJECT = "dalle_jax"


def check_installed() -> None:
    """Raises a ConfigError if the package `wandb` is missing."""
    if importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "config.metric_writers names wandb, and the package is missing: pip install 'dalle_jax[wandb]', or give "
            "--config.metric_writers=tensorboard."
        )


class WeightsAndBiases:
    """One run. Values keep their names, and "step" is the x axis of every chart."""

    def __init__(self, workdir: str, folder: pathlib.Path, config: Mapping[str, Any]):
        """Opens the run, or resumes it.

        Args:
          workdir: of the run, local or remote; decides which run it is, unless WANDB_RUN_ID does.
          folder: a local folder for wandb's files.
          config: the configuration.

        Raises:
          ConfigError: nobody is logged in, or the service does not answer.
        """
        wandb = importlib.import_module("wandb")  # an optional package, which takes a second
        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                id=os.environ.get("WANDB_RUN_ID", hashlib.sha256(workdir.encode()).hexdigest()[:16]),
                name=os.environ.get("WANDB_NAME", workdir.rstrip("/").rpartition("/")[2]),
                dir=str(folder),
                config=dict(config),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise ConfigError(
                f"Weights & Biases cannot be used: {str(error).splitlines()[0]} Log in (wandb login), set "
                "WANDB_MODE=offline, or give --config.metric_writers=tensorboard."
            ) from error
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of a step by name."""
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, path: pathlib.Path) -> None:
        """Logs an image file."""
        self._run.log({"step": step, name: self._wandb.Image(str(path))})

    def close(self) -> None:
        """Ends the run and waits until everything is written or sent."""
        self._run.finish()
