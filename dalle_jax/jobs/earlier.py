"""Earlier runs in a workdir: on which data and with which configuration they were trained.

A workdir belongs to its data. A tokenizer belongs to its data and its configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints import exported
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.compatibility import COMPUTE_KEYS, differences, flatten, to_json
from dalle_jax.errors import ConfigError
from dalle_jax.storage.files import full_path, is_remote
from dalle_jax.tasks import registry

Differences = Mapping[str, tuple[Any, Any]]  # key → (stored, given)

# Keys of `data` that say how examples are read, or that belong to evaluation.
_HOW = {f"data.{key}" for key in ("cache", "cache_bytes", "workers", "data_dir", "eval_split")}
_TRAINED = ("data", "model", "objective", "optimizer", "schedules", "ema", "batch_size", "seed")
# A tokenizer reads no captions. The number of its updates may grow, and slices of a batch change nothing else.
_NOT_TRAINED = re.compile(r"data\.(caption|bpe_dropout).*|schedules\..*steps|optimizer\.accumulate_steps")


def read(workdir: str) -> dict[str, Any] | None:
    """Returns the configuration of an earlier run in `workdir`, or None."""
    return workdirs.read_config(workdir) if workdirs.has_config(workdir) else None


def begun(workdir: str) -> bool:
    """Returns whether a workdir holds results: a checkpoint, a frozen tokenizer or a text model."""
    if workdirs.has_tokenizer(workdir) or workdirs.text_model_path(workdir).exists():
        return True
    return workdirs.latest_step(workdir) is not None


def data_differences(stored: Mapping[str, Any], config: ConfigDict) -> Differences:
    """Returns the keys of `data` in which two trainings read other examples or captions."""
    own = {"image_size", "augment", "bpe_dropout"}
    found = _differences(stored, config)
    keys = [key for key in found if key.startswith("data.") and key not in _HOW]
    return {key: found[key] for key in keys if key.removeprefix("data.") not in own}


def training_differences(stored: Mapping[str, Any], config: ConfigDict) -> Differences:
    """Returns the keys in which two trainings of an image tokenizer would give different ones.

    The number of updates is not among them, because a run may be continued.
    """
    return {key: values for key, values in _differences(stored, config).items() if _matters(key)}


def fingerprint(config: ConfigDict) -> str:
    """Returns six letters that tell apart the trainings that `training_differences` tells apart."""
    usual = registry.defaults(config)  # left out, so that new options do not change the letters
    flat = {key: value for key, value in _flat(to_json(config), config).items() if _matters(key)}
    flat = {key: value for key, value in flat.items() if value != usual.get(key)}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:6]


def listed(found: Differences) -> str:
    """Returns differences for a message: "data.path ('a', given: 'b')"."""
    return ", ".join(f"{key} ({old!r}, given: {new!r})" for key, (old, new) in found.items())


def check_resumes(config: ConfigDict, workdir: str) -> None:
    """Checks that an earlier run in `workdir` was a training of the same kind on the same data.

    A folder that no longer stands where it was is taken to have been moved.

    Raises:
      ConfigError: it was not. The message names the keys, and the workdir to give instead.
    """
    if exported.exists(workdir):
        raise ConfigError(
            f"--workdir={workdir} is an exported model. Give another --workdir, and --config.start_from={workdir} to "
            "start from its parameters."
        )
    stored = read(workdir)
    if stored is None or not begun(workdir):
        return
    found = dict(data_differences(stored, config))
    for key in ("task", "prior"):
        if stored.get(key) != config.get(key):
            found[key] = stored.get(key), config.get(key)
    moved = found.get("data.path")
    if moved and moved[0] and not is_remote(moved[0]) and not os.path.exists(moved[0]):
        logging.warning("%s: data.path was %s, which does not exist any more; %s is read instead.", workdir, *moved)
        del found["data.path"]
    if found:
        raise ConfigError(
            f"{workdir} holds a training with other values: {listed(found)}. Give another directory, such as "
            f"--workdir={str(workdir).rstrip('/')}-2, or the stored values to resume that training. "
            f"--config.start_from={workdir} starts the new one from its parameters."
        )


def _differences(stored: Mapping[str, Any], config: ConfigDict) -> Differences:
    return differences(_flat(stored, config), _flat(to_json(config), config))


def _flat(stored: Mapping[str, Any], config: ConfigDict) -> dict[str, Any]:
    """Flattens a configuration, with the defaults of keys that it lacks and with the whole `data.path`."""
    flat = {**registry.defaults(config), **flatten(stored)}
    if path := flat.get("data.path"):
        flat["data.path"] = path if is_remote(path) else os.path.realpath(full_path(path))
    return {key: value for key, value in flat.items() if value != {}}


def _matters(key: str) -> bool:
    if key in _HOW or key in COMPUTE_KEYS or _NOT_TRAINED.fullmatch(key):
        return False
    return key.partition(".")[0] in _TRAINED
