"""Schedules: functions of the number of updates, built from a section of a configuration.

    learning_rate=dict(kind="cosine", start=1e-4, end=1.25e-6, steps=1_200_000)

Each kind is a frozen dataclass and an `optax.Schedule`: it maps an int32 step, traced or not, to a float32 value. After
its last step a schedule keeps its value.

The formulas are not those of `optax.schedules`. Those round differently in 16 to 47% of all steps, have no rising
cosine, and reject a training that is shorter than its warmup.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax.configuration.options import from_config
from dalle_jax.configuration.values import finite, natural
from dalle_jax.errors import ConfigError


def _cosine(start: float, end: float, fraction: jax.Array) -> jax.Array:
    """Returns half a cosine from `start` (fraction 0) to `end` (fraction 1), constant outside."""
    return end + (start - end) * 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(fraction, 0.0, 1.0)))


def _progress(step: jax.Array | int, steps: int) -> jax.Array:
    """Returns the fraction of `steps` that is done, float32, at least 1 after the end."""
    return jnp.asarray(step, jnp.float32) / max(steps, 1)


@dataclasses.dataclass(frozen=True)
class Constant:
    """The constant `value`."""

    value: float

    def __call__(self, step: jax.Array | int) -> jax.Array:
        return jnp.full(jnp.shape(step), self.value, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear change from `start` to `end` in `steps` updates."""

    start: float
    end: float
    steps: int

    def __call__(self, step: jax.Array | int) -> jax.Array:
        return self.start + (self.end - self.start) * jnp.clip(_progress(step, self.steps), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end`, up or down, in `steps` updates. The dVAE has three of them."""

    start: float
    end: float
    steps: int

    def __call__(self, step: jax.Array | int) -> jax.Array:
        return _cosine(self.start, self.end, _progress(step, self.steps))


@dataclasses.dataclass(frozen=True)
class WarmupConstant:
    """A linear rise from 0 to `value` in `warmup_steps` updates, then constant."""

    value: float
    warmup_steps: int

    def __call__(self, step: jax.Array | int) -> jax.Array:
        return self.value * jnp.clip(_progress(step, self.warmup_steps), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Delayed:
    """0 for `wait_steps` updates, then a linear rise to `value` in `warmup_steps` updates, then constant.

    With warmup_steps=0, it is a step. The adversarial loss of a VQGAN starts like this.
    """

    value: float
    wait_steps: int
    warmup_steps: int = 0

    def __call__(self, step: jax.Array | int) -> jax.Array:
        since = jnp.asarray(step, jnp.float32) - self.wait_steps
        return self.value * jnp.clip((since + 1) / (self.warmup_steps + 1), 0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """A linear rise from 0 to `peak` in `warmup_steps` updates, then half a cosine to `end` at update `steps`.

    A training of at most `warmup_steps` updates ends during the warmup.
    """

    peak: float
    end: float
    warmup_steps: int
    steps: int

    def __call__(self, step: jax.Array | int) -> jax.Array:
        warmup = self.peak * _progress(step, self.warmup_steps)
        after = jnp.asarray(step, jnp.float32) - self.warmup_steps
        fall = _cosine(self.peak, self.end, after / max(self.steps - self.warmup_steps, 1))
        return jnp.where(jnp.asarray(step) < self.warmup_steps, warmup, fall)


_KINDS = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "warmup_constant": WarmupConstant,
    "delayed": Delayed,
    "warmup_cosine": WarmupCosine,
}


def make(section: Mapping[str, Any], name: str = "schedule") -> optax.Schedule:
    """Builds a schedule from its section of a configuration.

    Args:
      section: mapping with "kind" (constant, linear, cosine, warmup_constant, delayed, warmup_cosine) and that kind's
        fields.
      name: name of the schedule, for messages.

    Returns:
      A function from int32 steps [...] to float32 [...].

    Raises:
      ConfigError: the kind or a field is unknown, a field is missing, a value is not a number, or steps are negative.
    """
    where = f"schedules.{name}"
    kind = section.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"config.{where}.kind is {kind!r}: expected one of {', '.join(_KINDS)}.")
    fields = {key: section[key] for key in section if key != "kind"}
    for key, value in fields.items():
        finite(f"config.{where}.{key}", value)
        if key.endswith("steps"):
            natural(f"config.{where}.{key}", int(value) if value == int(value) else value)  # 1e6 is a whole number
    return from_config(_KINDS[kind], fields, where)
