"""Finds the image tokenizer of a prior: a trained one of the same data and configuration, or the place to train it."""

from __future__ import annotations

from typing import Any

from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import tokenizer as kinds
from dalle_jax.jobs import earlier
from dalle_jax.jobs.preparation import file_of
from dalle_jax.reporting.metric_writer import read_metrics


def choose_workdir(config: ConfigDict) -> str:
    """Returns the workdir of a prior's tokenizer.

    This is `config.tokenizer.workdir` if it is empty or holds a training with the same data and configuration.
    Otherwise the default workdir gets a suffix that belongs to this data and configuration, such as
    "runs/dvae-small-3fa9c1". A workdir that the user chose is never replaced.

    Args:
      config: configuration of a prior, as from `preparation.prepare`.

    Raises:
      ConfigError: the chosen workdir holds another training.
    """
    inner = config.tokenizer
    chosen = inner.workdir
    own = f"{chosen.rstrip('/')}-{earlier.fingerprint(inner)}"
    is_default = chosen == f"runs/{file_of(inner)}-{inner.variant}"
    if is_default and earlier.read(own):
        return own
    stored = earlier.read(chosen)
    if stored is None:
        return chosen
    found = dict(earlier.training_differences(stored, inner))
    if stored.get("task") != inner.task:
        found["task"] = stored.get("task"), inner.task
    if not found:
        return chosen
    if not is_default:
        raise ConfigError(
            f"config.tokenizer.workdir={chosen!r} holds a training with other values: {earlier.listed(found)}. Give "
            f"another --config.tokenizer.workdir=DIR to train one, or --config.tokenizer_from={chosen} to use that one."
        )
    logging.info("%s holds another image tokenizer (%s); this one is in %s", chosen, earlier.listed(found), own)
    return own


def describe(workdir: str, step: int | None = None) -> str:
    """Describes a tokenizer for the log: where it is, on which images it was trained, and how far.

    Args:
      workdir: of the tokenizer.
      step: of its checkpoint; None for the one that `load_tokenizer` reads.
    """
    stored = earlier.read(workdir)
    if stored is None:
        return f"{workdir} (imported)"
    inner = stored.get("tokenizer", stored)  # a prior's workdir holds its tokenizer
    data = inner["data"]
    parts = [f"{data.get('path') or data['source']}, {data['image_size']} pixels"]
    if inner is stored:
        step = workdirs.tokenizer_step(workdir) if step is None else step
        parts.append(f"step {step}")
        if (psnr := _value(workdir, "eval/psnr", step)) is not None:
            parts.append(f"held-out psnr {psnr:.2f} dB")
    return f"{workdir}, trained on {'; '.join(parts)}"


def _value(workdir: str, key: str, step: int | None) -> Any:
    """Returns the value of a metric at a step in metrics.jsonl, or None."""
    rows = reversed(read_metrics(workdir))
    return next((row[key] for row in rows if row["step"] == step and row.get(key) is not None), None)


def has_tokenizer(workdir: str) -> bool:
    """Returns whether a workdir holds a tokenizer: a frozen one, or a dVAE training with a checkpoint."""
    if workdirs.has_tokenizer(workdir):
        return True
    stored = earlier.read(workdir)
    return stored is not None and stored.get("task") in kinds.TASKS and workdirs.latest_step(workdir) is not None
