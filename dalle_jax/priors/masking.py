"""Which image tokens are masked: how many, in training and at each decoding step, and which of them first (MaskGIT,
sections 3.1 and 3.3; the reference code `google-research/maskgit`).

    B rows    N image tokens    r ratio in [0, 1]    γ(r) share of tokens masked
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.errors import ConfigError
from dalle_jax.priors import orders
from dalle_jax.token_layout import TokenLayout

# -- how many -----------------------------------------------------------------------------------------------------

# name: γ(r, number of tokens); "pow2", "pow3", "pow0.5", … are 1 - rᵖ.
SCHEDULES = {
    "cosine": lambda r, n: jnp.cos(r * (math.pi / 2)),
    "linear": lambda r, n: 1 - r,
    "log": lambda r, n: -jnp.log2(jnp.maximum(r, 1e-6)) / jnp.log2(jnp.maximum(n, 2)),
    "exp": lambda r, n: 1 - jnp.exp2(-jnp.log2(jnp.maximum(n, 2)) * (1 - r)),
    "arccos": lambda r, n: jnp.arccos(r) * (2 / math.pi),
}


def check_schedule(name: str) -> None:
    """Checks that `masked_share` knows a schedule.

    Raises:
      ConfigError: it does not; the message lists the known ones.
    """
    try:
        known = name in SCHEDULES or (name.startswith("pow") and float(name[3:]) > 0)
    except ValueError:
        known = False
    if not known:
        known = ", ".join(SCHEDULES)
        raise ConfigError(f"config.model.mask_schedule is {name!r}; expected one of {known}, or powP (1 - r^P).")


def masked_share(name: str, ratio: jax.Array, count: jax.Array) -> jax.Array:
    """γ(r) in [1e-6, 1], float32 of the shape of both.

    Args:
      name: of the schedule.
      ratio: r, float32: 0 masks all, 1 none.
      count: number of tokens it is a share of; "log" and "exp" depend on it.
    """
    ratio, count = jnp.asarray(ratio, jnp.float32), jnp.asarray(count, jnp.float32)
    share = SCHEDULES[name](ratio, count) if name in SCHEDULES else 1 - ratio ** float(name[3:])
    return jnp.clip(share, 1e-6, 1.0)


def training_counts(name: str, ratio: jax.Array, length: int) -> jax.Array:
    """How many of N tokens a training example masks: max(1, ⌊N·γ(r)⌋), int32 of the shape of `ratio`."""
    return jnp.maximum(1, _whole(length * masked_share(name, ratio, length)))


def still_masked(name: str, step: jax.Array, steps: int, at_start: jax.Array, now: jax.Array) -> jax.Array:
    """How many tokens of each row stay masked after a decoding step: int32 [B].

    Args:
      name: of the schedule.
      step: t, int32 [], from 0.
      steps: T; the last step leaves none.
      at_start: int32 [B], unknown tokens of the row when decoding began.
      now: int32 [B], unknown tokens before this step.
    """
    planned = _whole(at_start * masked_share(name, (step + 1) / steps, at_start))
    left = jnp.maximum(1, jnp.minimum(now - 1, planned))
    return jnp.where(step + 1 == steps, 0, jnp.minimum(left, now))  # the last: a row that has nothing unknown


def _whole(x: jax.Array) -> jax.Array:
    """⌊x⌋ as int32; what float32 puts a little below a whole number (256·cos(π/3)) counts as that number."""
    return jnp.floor(x + 1e-3).astype(jnp.int32)


# -- which --------------------------------------------------------------------------------------------------------


def ranks(scores: jax.Array) -> jax.Array:
    """The place of each score in ascending order, int32 [B, N]: 0 the lowest; ties in order of position."""
    order = jnp.argsort(scores.astype(jnp.float32), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def random_mask(key: jax.Array, counts: jax.Array, length: int) -> jax.Array:
    """Exactly `counts`, int32 [B], positions of each row, uniformly at random: bool [B, N]."""
    return ranks(jax.random.uniform(key, (*counts.shape, length))) < counts[:, None]


class UnmaskingOrder(Protocol):
    """Which of the positions just drawn are kept: those with the highest scores."""

    def scores(self, log_probability: jax.Array, noise: jax.Array, ratio: jax.Array) -> jax.Array:
        """
        Args:
          log_probability: float32 [B, N], of the token drawn at each position.
          noise: float32 [B, N], standard Gumbel, fresh in each step.
          ratio: float32 [], (t + 1) / T.

        Returns:
          float32 [B, N].
        """


@dataclasses.dataclass(frozen=True)
class Confidence:
    """MaskGIT's rule: ln p(drawn) + τ·(1 - ratio)·Gumbel.

    Attributes:
      temperature: τ, 4.5 in the reference code; 0 takes the surest.
    """

    temperature: float = 4.5

    def scores(self, log_probability, noise, ratio):
        return log_probability + self.temperature * (1 - ratio) * noise


@dataclasses.dataclass(frozen=True)
class Random:
    """Any position as well as any other."""

    def scores(self, log_probability, noise, ratio):
        return noise


@dataclasses.dataclass(frozen=True)
class Halton:
    """A fixed order that spreads over the grid, so that tokens drawn in one step are far apart (arXiv 2503.17076).

    Attributes:
      height, width: of the grid.
    """

    height: int
    width: int

    def scores(self, log_probability, noise, ratio):
        rank = np.empty(self.height * self.width, np.float32)
        rank[orders.halton(self.height, self.width)] = np.arange(len(rank))
        return jnp.broadcast_to(-jnp.asarray(rank), log_probability.shape)


ORDERS = ("confidence", "random", "halton")


def unmasking_order(name: str, layout: TokenLayout, temperature: float) -> UnmaskingOrder:
    """The order of that name.

    Raises:
      ConfigError: where there is none.
    """
    if name not in ORDERS:
        raise ConfigError(f"The unmasking order is {name!r}; expected one of {', '.join(ORDERS)}.")
    if name == "confidence":
        return Confidence(temperature)
    return Random() if name == "random" else Halton(layout.height, layout.width)
