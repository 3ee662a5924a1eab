"""Validation of a training configuration before any resource is created."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from dalle_jax.configuration.options import from_config
from dalle_jax.configuration.values import check_seed, finite, natural
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import check_batch
from dalle_jax.distributed.turns import first_host_first, is_first, joined
from dalle_jax.errors import ConfigError
from dalle_jax.optim import schedules
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.reporting.metric_writer import writers_of
from dalle_jax.storage.files import full_path, make_workdir
from dalle_jax.training.evaluations import check_stop_after

# Smallest value: keys.
_LEAST = {
    1: ("steps", "max_nonfinite", "eval_batches", "cadence.log", "keep.last"),
    0: ("cadence.eval", "cadence.preview", "cadence.checkpoint", "keep.best", "profile_steps"),
}
_LARGEST_BATCH = 2**20
_SHORTEST = 1e-3  # seconds
_LONGEST = 1e9  # seconds: Python's wait functions overflow beyond this


def check_values(config: ConfigDict) -> None:
    """Checks the values of a training configuration outside of its task's sections, without devices.

    Raises:
      ConfigError: an invalid value or an unknown key.
    """
    for least, names in _LEAST.items():
        for name in names:
            value = config
            for part in name.split("."):
                value = value[part]
            natural(f"config.{name}", value, least)
    natural("config.batch_size", config.batch_size, 1, _LARGEST_BATCH)
    check_seed(config.seed, "config.seed")
    check_duration(config)
    for name, seconds in config.timeout_seconds.items():
        finite(f"config.timeout_seconds.{name}", seconds, _SHORTEST, _LONGEST)
    check_stop_after(config)
    writers_of(config.get("metric_writers", ""))
    from_config(OptimizerOptions, config.optimizer, "optimizer")
    from_config(AverageOptions, config.ema, "ema")
    for name, section in config.schedules.items():
        _check_schedule(schedules.make(section, name), name, config.steps)


def check_duration(config: ConfigDict) -> None:
    """Checks `config.minutes`; raises a `ConfigError`."""
    if (minutes := config.get("minutes")) is not None:
        finite("config.minutes", minutes, above=0, high=_LONGEST / 60)


def validate(config: ConfigDict) -> tuple[Mesh, OptimizerOptions, AverageOptions]:
    """Validates the configuration before any resource is created.

    Returns:
      The mesh, the optimizer's options and the moving average's options.

    Raises:
      ConfigError: an invalid value or an unknown key.
      MeshError: the mesh does not fit the devices, or the batch does not fit the mesh.
    """
    check_values(config)
    if jax.process_count() > 1 and not joined():
        raise ConfigError(
            f"This is one of {jax.process_count()} hosts of a TPU slice, but it has not joined them. Give "
            "--coordinator_address=auto on each host."
        )
    return mesh_and_options(config)


def _check_schedule(schedule: optax.Schedule, name: str, steps: int) -> None:
    """Checks a schedule's values at the beginning, in the middle and at the end of a training."""
    for step in (0, steps // 2, steps):
        value = float(schedule(step))
        above_0 = name == "temperature"  # the relaxation divides by it
        if not math.isfinite(value) or value < 0 or (above_0 and value == 0):
            expected = "more than 0" if above_0 else "0 or more"
            raise ConfigError(f"config.schedules.{name} is {value:g} at update {step}; expected {expected}.")


def mesh_and_options(
    config: ConfigDict, devices: Sequence[jax.Device] | None = None
) -> tuple[Mesh, OptimizerOptions, AverageOptions]:
    """Reads the sections that a compiled update depends on besides its task.

    Args:
      config: a training configuration.
      devices: devices of the mesh. None uses all devices of all hosts.

    Returns:
      The mesh, the optimizer's options and the moving average's options.

    Raises:
      ConfigError: an invalid value or an unknown key.
      MeshError: the mesh does not fit the devices, or the batch does not fit the mesh.
    """
    mesh = make_mesh(**config.mesh, devices=devices)
    options = from_config(OptimizerOptions, config.optimizer, "optimizer")
    average = from_config(AverageOptions, config.ema, "ema")
    check_batch(mesh, config.batch_size, options.accumulate_steps)
    return mesh, options, average


def make_shared_workdir(workdir: str) -> str:
    """Creates the workdir on the first host, checks that all hosts see it, and returns its full name.

    Raises:
      ConfigError: it is empty, cannot be created, or is invisible to this host.
    """
    if not workdir:
        raise ConfigError("No workdir: give --workdir=DIR or config.workdir, the directory for the run's files.")
    with first_host_first(f"the workdir {workdir}"):
        if is_first():
            return make_workdir(workdir)
        path = full_path(workdir)
        if not path.exists():
            raise ConfigError(
                f"The first host created {path}, but this host does not see it. Several hosts need a shared workdir "
                "(a network file system, or gs://…)."
            )
        return str(path)
