"""Comparison of configurations: the keys that may change when a run resumes, and those that may not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from dalle_jax.errors import ConfigMismatch

# Sections of the configuration that describe the parameters. They must not change between a checkpoint and its reader.
MODEL_SECTIONS = ("task", "model", "text", "data.image_size", "data.condition", "lora", "discriminator")
# Exceptions: keys that only say how to compute.
COMPUTE_KEYS = (
    "model.remat", "model.dtype", "model.trunk.remat", "model.trunk.dtype", "model.trunk.attention_kernel",
    "model.attention_kernel",
    "model.trunk.float32_residual", "model.trunk.float32_logits",
    "discriminator.dtype",
    "model.image_positions",  # the initial size
)  # fmt: skip


def to_json(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration as plain JSON values. Tuples become lists."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return json.loads(json.dumps(plain, default=str))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens {"a": {"b": 1}} to {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the keys whose values differ: {"a.b": (stored, given)}.  Absent keys have the value None."""
    old, new = flatten(stored), flatten(given)
    return {key: (old.get(key), new.get(key)) for key in sorted({*old, *new}) if old.get(key) != new.get(key)}


def check_same_model(
    stored: Mapping[str, Any], given: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None
) -> None:
    """Checks that a checkpoint's configuration describes the model that is asked for.

    Args:
      stored: the checkpoint's configuration.
      given: the configuration of the reader.
      where: the checkpoint, for messages.
      defaults: values by dotted key, which hold for a configuration that lacks the key. A stored configuration lacks
        the keys that are newer than it.

    Raises:
      ConfigMismatch: it describes another model. The message names the keys.
    """

    def describes_model(key: str, values: tuple[Any, Any]) -> bool:
        if key == "ema.decay":  # zero or not decides whether an average is stored
            return bool(values[0]) != bool(values[1])
        inside = any(key == section or key.startswith(f"{section}.") for section in MODEL_SECTIONS)
        return inside and key not in COMPUTE_KEYS

    changed = differences({**(defaults or {}), **flatten(stored)}, {**(defaults or {}), **flatten(given)})
    wrong = {key: values for key, values in changed.items() if describes_model(key, values)}
    if wrong:
        listed = ", ".join(f"{key} (checkpoint: {old!r}, given: {new!r})" for key, (old, new) in wrong.items())
        raise ConfigMismatch(
            f"The checkpoint in {where} holds another model than the configuration describes: {listed}. "
            "Give the same values, or another --workdir to start from scratch."
        )
    for key, (old, new) in changed.items():
        logging.info("config.%s changed since the checkpoint: %r -> %r", key, old, new)
