"""Checks of a folder and a step before a model is loaded from it."""

from __future__ import annotations

import os
from typing import Any

from jax.sharding import Mesh

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.values import natural, shown
from dalle_jax.errors import CheckpointError, ConfigError
from dalle_jax.storage.files import access, expanded

_LISTED = 10  # runs in a message


def check_path(name: str, folder: Any) -> None:
    """Checks that an argument is a path; raises a `ConfigError`."""
    if not isinstance(folder, str | os.PathLike) or not str(folder).strip() or "\0" in str(folder):
        raise ConfigError(f"{name} is {shown(folder)}; expected the path of a folder.")


def check_mesh(mesh: Any) -> None:
    """Checks that an argument is a mesh or None; raises a `ConfigError`."""
    if not isinstance(mesh, Mesh | None):
        raise ConfigError(f"mesh is {shown(mesh)}; expected a mesh from dalle_jax.distributed.mesh.make_mesh, or None.")


def check_workdir(folder: str | os.PathLike) -> None:
    """Checks that a folder exists, and that it is not the folder around several workdirs.

    Raises:
      ConfigError: its storage cannot be reached.
      CheckpointError: there is no such folder, or it holds workdirs. The message lists them.
    """
    with access(folder):
        path = expanded(folder)
        if (path / "config.json").exists():
            return
        if not path.exists():
            raise CheckpointError(f"There is no folder {folder}. Check the path.")
        if not path.is_dir():
            raise CheckpointError(f"{folder} is a file; expected the workdir of a training.")
        runs = sorted(str(each) for each in path.iterdir() if (each / "config.json").exists())
    if runs:
        listed = [_described(run) for run in runs[:_LISTED]] + [f"{len(runs) - _LISTED} more"] * (len(runs) > _LISTED)
        raise CheckpointError(
            f"{folder} is not the workdir of a training: it has no config.json. It holds these runs: "
            f"{', '.join(listed)}. Give one of them."
        )


def _described(run: str) -> str:
    return f"{run} ({workdirs.read_config(run).get('task')})" if workdirs.has_config(run) else run


def check_step(step: Any, name: str = "step") -> int | str | None:
    """Checks the step of a checkpoint: a whole number, "best" or None. Digits in a string are a number.

    Args:
      step: the value.
      name: of the argument or key, for messages.

    Raises:
      ConfigError: something else.
    """
    if step is None:
        return None
    if isinstance(step, str):
        if step == "best":
            return step
        if step.isascii() and step.isdigit() and len(step) < 20:
            return int(step)
        raise ConfigError(f'{name} is {shown(step)}; expected a whole number, "best", or None for the latest.')
    return natural(name, step)
