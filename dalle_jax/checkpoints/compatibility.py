"""Which configurations and parameters are the same model: what may change when a run goes on, and what may not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from dalle_jax.errors import ConfigMismatch

# Sections of the configuration that describe the parameters: they must not change between a checkpoint and its reader.
MODEL_SECTIONS = ("task", "model", "text", "data.image_size")
# ... except what only says how to compute.
COMPUTE_KEYS = (
    "model.remat", "model.dtype", "model.trunk.remat", "model.trunk.dtype", "model.trunk.attention_kernel",
    "model.image_positions",  # how large they start
)  # fmt: skip


def to_json(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as plain JSON values (tuples become lists)."""
    plain = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    return json.loads(json.dumps(plain, default=str))


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def differences(stored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ between two configurations: {"a.b": (stored, given)}; an absent one is None."""
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
      ConfigMismatch: it does not; names the keys.
    """

    def describes_model(key: str, values: tuple[Any, Any]) -> bool:
        if key == "ema.decay":  # whether an average is stored at all
            return bool(values[0]) != bool(values[1])
        inside = any(key == section or key.startswith(f"{section}.") for section in MODEL_SECTIONS)
        return inside and key not in COMPUTE_KEYS

    changed = differences({**(defaults or {}), **flatten(stored)}, {**(defaults or {}), **flatten(given)})
    wrong = {key: values for key, values in changed.items() if describes_model(key, values)}
    if wrong:
        listed = ", ".join(f"{key} (checkpoint: {old!r}, given: {new!r})" for key, (old, new) in wrong.items())
        raise ConfigMismatch(
            f"The checkpoint in {where} holds another model than the configuration asks for: {listed}. "
            "Give the same values, or another --workdir to start afresh."
        )
    for key, (old, new) in changed.items():
        logging.info("config.%s changed since the checkpoint: %r -> %r", key, old, new)
