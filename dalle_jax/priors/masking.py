"""Masking of image tokens: how many are masked, and which of them are unmasked first.

MaskGIT (arXiv 2202.04200), sections 3.1 and 3.3, and its reference code `google-research/maskgit`.

    B rows    N image tokens    r ratio in [0, 1]    γ(r) share of masked tokens
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from dalle_jax.errors import ConfigError
from dalle_jax.priors import orders
from dalle_jax.token_layout import TokenLayout

# -- number -------------------------------------------------------------------------------------------------------

# name: γ(r, number of tokens). Names such as "pow2" and "pow0.5" stand for 1 - rᵖ.
SCHEDULES = {
    "cosine": lambda r, n: jnp.cos(r * (math.pi / 2)),
    "linear": lambda r, n: 1 - r,
    "log": lambda r, n: -jnp.log2(jnp.maximum(r, 1e-6)) / jnp.log2(jnp.maximum(n, 2)),
    "exp": lambda r, n: 1 - jnp.exp2(-jnp.log2(jnp.maximum(n, 2)) * (1 - r)),
    "arccos": lambda r, n: jnp.arccos(r) * (2 / math.pi),
}


def check_schedule(name: str) -> None:
    """Checks the name of a mask schedule.

    Raises:
      ConfigError: an unknown name; the message lists the known ones.
    """
    try:
        known = name in SCHEDULES or (name.startswith("pow") and 0 < float(name[3:]) <= 1000)
    except ValueError:
        known = False
    if not known:
        known = ", ".join(SCHEDULES)
        raise ConfigError(f"config.model.mask_schedule is {name!r}; expected one of {known}, or powP (1 - r^P).")


def masked_share(
    name: str, ratio: Float[ArrayLike, "*#rows"], count: Float[ArrayLike, "*#rows"] | Int[ArrayLike, "*#rows"]
) -> Float[Array, "*#rows"]:
    """Computes γ(r), the share of masked tokens.

    Args:
      name: name of the schedule.
      ratio: r, float32; 0 masks all tokens, 1 masks none.
      count: number of tokens, which "log" and "exp" depend on; broadcast against `ratio`.

    Returns:
      Shares in [1e-6, 1], float32.
    """
    ratio, count = jnp.asarray(ratio, jnp.float32), jnp.asarray(count, jnp.float32)
    share = SCHEDULES[name](ratio, count) if name in SCHEDULES else 1 - ratio ** float(name[3:])
    return jnp.clip(share, 1e-6, 1.0)


def training_counts(name: str, ratio: Float[ArrayLike, "*rows"], length: int) -> Int[Array, "*rows"]:
    """Computes how many tokens a training example masks: max(1, ⌊N·γ(r)⌋).

    Args:
      name: name of the schedule.
      ratio: r of each row, float32 [B].
      length: N.

    Returns:
      int32 [B].
    """
    return jnp.maximum(1, _whole(length * masked_share(name, ratio, length)))


def still_masked(
    name: str,
    step: Int[ArrayLike, ""],
    steps: int,
    at_start: Int[ArrayLike, " B"],
    now: Int[ArrayLike, " B"],
) -> Int[Array, " B"]:
    """Computes how many tokens of each row stay masked after a decoding step.

    Args:
      name: name of the schedule.
      step: t, int32 scalar, from 0.
      steps: number of decoding steps; the last one leaves no token masked.
      at_start: number of masked tokens before decoding, int32 [B].
      now: number of masked tokens before this step, int32 [B].

    Returns:
      int32 [B].
    """
    planned = _whole(at_start * masked_share(name, (step + 1) / steps, at_start))
    left = jnp.maximum(1, jnp.minimum(now - 1, planned))
    return jnp.where(step + 1 == steps, 0, jnp.minimum(left, now))  # a row may have no masked token


def _whole(x: ArrayLike) -> Array:
    """Computes ⌊x⌋ as int32. Numbers that float32 rounds just below an integer, as 256·cos(π/3), count as that one."""
    return jnp.floor(x + 1e-3).astype(jnp.int32)


# -- positions ----------------------------------------------------------------------------------------------------


def ranks(scores: Float[ArrayLike, "B N"]) -> Int[Array, "B N"]:
    """Ranks the scores of each row, int32 [B, N]: 0 is the lowest. Ties are ranked by position."""
    order = jnp.argsort(scores.astype(jnp.float32), axis=-1, stable=True)
    return jnp.argsort(order, axis=-1, stable=True).astype(jnp.int32)


def random_mask(key: Key[Array, ""], counts: Int[ArrayLike, " B"], length: int) -> Bool[Array, "B N"]:
    """Selects exactly `counts` positions of each row uniformly at random.

    Args:
      key: scalar key.
      counts: number of positions, int32 [B].
      length: N.

    Returns:
      True where selected, bool [B, N].
    """
    return ranks(jax.random.uniform(key, (*counts.shape, length))) < counts[:, None]


@runtime_checkable
class UnmaskingOrder(Protocol):
    """Scores the tokens that a decoding step has drawn. The tokens with the highest scores are kept."""

    def scores(
        self,
        log_probability: Float[ArrayLike, "B N"],
        noise: Float[ArrayLike, "B N"],
        ratio: Float[ArrayLike, ""],
    ) -> Float[ArrayLike, "B N"]:
        """Computes a score for each position.

        Args:
          log_probability: log-probability of the token drawn at each position, float32 [B, N].
          noise: standard Gumbel noise, new in each step, float32 [B, N].
          ratio: (t + 1) / number of steps, float32 scalar.

        Returns:
          float32 [B, N].
        """


@dataclasses.dataclass(frozen=True)
class Confidence:
    """Keeps the most confident tokens (MaskGIT): ln p(drawn) + τ·(1 - ratio)·Gumbel.

    Attributes:
      temperature: τ, 4.5 in the reference code; 0 keeps the tokens of highest probability.
    """

    temperature: float = 4.5

    def scores(
        self, log_probability: Float[ArrayLike, "B N"], noise: Float[ArrayLike, "B N"], ratio: Float[ArrayLike, ""]
    ) -> Float[ArrayLike, "B N"]:
        """See `UnmaskingOrder.scores`."""
        return log_probability + self.temperature * (1 - ratio) * noise


@dataclasses.dataclass(frozen=True)
class Random:
    """Keeps tokens at uniformly random positions."""

    def scores(
        self, log_probability: Float[ArrayLike, "B N"], noise: Float[ArrayLike, "B N"], ratio: Float[ArrayLike, ""]
    ) -> Float[ArrayLike, "B N"]:
        """See `UnmaskingOrder.scores`."""
        return noise


@dataclasses.dataclass(frozen=True)
class Halton:
    """Keeps tokens in a fixed order that spreads over the grid (arXiv 2503.17076).

    Tokens that are drawn in one step are therefore far apart.

    Attributes:
      height: h, rows of the grid.
      width: w, columns of the grid.
    """

    height: int
    width: int

    def scores(
        self, log_probability: Float[ArrayLike, "B N"], noise: Float[ArrayLike, "B N"], ratio: Float[ArrayLike, ""]
    ) -> Float[ArrayLike, "B N"]:
        """See `UnmaskingOrder.scores`."""
        rank = np.empty(self.height * self.width, np.float32)
        rank[orders.halton(self.height, self.width)] = np.arange(len(rank))
        return jnp.broadcast_to(-jnp.asarray(rank), log_probability.shape)


ORDERS = ("confidence", "random", "halton")


def unmasking_order(name: str, layout: TokenLayout, temperature: float) -> UnmaskingOrder:
    """Builds an unmasking order by name.

    Args:
      name: one of `ORDERS`.
      layout: layout of the token stream.
      temperature: τ of "confidence".

    Raises:
      ConfigError: an unknown name.
    """
    if name not in ORDERS:
        raise ConfigError(f"The unmasking order is {name!r}; expected one of {', '.join(ORDERS)}.")
    if name == "confidence":
        return Confidence(temperature)
    return Random() if name == "random" else Halton(layout.height, layout.width)
