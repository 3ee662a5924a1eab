"""The end of a training whose loss or gradients stay infinite or NaN, and the checkpoint to go back to."""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

from dalle_jax.errors import NonFiniteError


def error(step: int, skipped: int, stored: Sequence[int], directory: epath.Path, clip_norm: float) -> NonFiniteError:
    """Returns the error of a training that ends because updates are skipped.

    Skipped updates change no parameters. A checkpoint among them, or directly before them, therefore holds the
    parameters with which the first of them failed, and may fail again.

    Args:
      step: number of steps done.
      skipped: number of latest steps that were skipped in a row.
      stored: steps of the checkpoints, ascending.
      directory: of the checkpoints.
      clip_norm: that of the optimizer; 0 if it does not clip.
    """
    last = step - skipped  # the last step that changed the parameters
    older, same = [x for x in stored if x < last], [x for x in stored if x >= last]
    if not stored:
        where = "No checkpoint exists yet."
    elif not same:
        where = f"The checkpoint of step {older[-1]} is older."
    else:
        folders = " and ".join(str(directory / str(x)) for x in same)
        remedy = f"delete {folders} to resume from step {older[-1]}" if older else "start in another --workdir"
        where = f"The checkpoint of step {same[-1]} holds these parameters. If the error returns, {remedy}."
    if clip_norm:
        clip = f"lower optimizer.clip_norm={clip_norm:g}"
    else:
        clip = "clip the gradients: --config.optimizer.clip_norm=1"
    return NonFiniteError(
        f"Loss or gradients were not finite in {skipped} steps in a row (steps {last + 1} to {step}). None of them "
        f"changed the parameters of step {last}. {where} Lower schedules.learning_rate, or {clip}."
    )
