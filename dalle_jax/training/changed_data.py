"""The message for a training that resumes after its data set changed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ml_collections import ConfigDict

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.compatibility import differences, to_json
from dalle_jax.errors import DataChanged


@contextlib.contextmanager
def explain_changed_data(config: ConfigDict, workdir: str, checkpoints: Checkpoints) -> Iterator[None]:
    """Adds to a `DataChanged` of the block which keys of `data` changed, and how to train on the new data.

    Args:
      config: the given configuration.
      workdir: of the training.
      checkpoints: of the workdir.
    """
    try:
        yield
    except DataChanged as error:
        changed = differences(checkpoints.config().get("data", {}), to_json(config.data))
        listed = "".join(f" config.data.{key} was {old!r}, is {new!r}." for key, (old, new) in changed.items())
        raise DataChanged(
            f"{error}{listed} A training resumes with the number of examples that it began with. Restore them, or "
            f"begin a new training in another workdir: --workdir=NEW --config.start_from={workdir} starts it from the "
            "parameters of this one. Leave start_from out to start from scratch."
        ) from error
