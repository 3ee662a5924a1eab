"""Opens the trained parameters of a folder, whether it is the workdir of a training or an export."""

from __future__ import annotations

from etils import epath

from dalle_jax.checkpoints import exported
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.exported import Exported


def open_run(folder: epath.PathLike, best_metric: str = "") -> Checkpoints | Exported:
    """Opens a folder for reading. Both kinds have `config`, `restore_params`, `resolve` and `steps`.

    Args:
      folder: workdir of a training, or an exported folder; local or "gs://…".
      best_metric: see `Checkpoints`.

    Raises:
      CheckpointError: the storage cannot be read, or the export is damaged.
    """
    if exported.exists(folder):
        return Exported(folder)
    return Checkpoints(str(folder), best_metric=best_metric, read_only=True)
