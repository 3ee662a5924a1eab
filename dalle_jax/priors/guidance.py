"""Classifier-free guidance of the logits, and how its scale grows while an image is drawn.

Logits are (1 + s·f(r))·conditional - s·f(r)·null (Muse, arXiv 2301.00704, section 2.7). The share r = t / T of the
decoding steps 1 to T counts the step that is drawn, so that the last step has r = 1. The schedules f(r) are:

    constant     1                          LlamaGen (arXiv 2406.06525)
    linear       r                          Muse; the default of MaskGIT
    cosine       (1 - cos(π·r)) / 2
    cosineP      (1 - cos(π·r^P)) / 2       RAR (arXiv 2411.00776), which counts t from 0: one step later than here
    powP         r^P

P is a number, as in "cosine2.75" and "pow2". Early steps with little guidance make images more varied.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from dalle_jax.configuration.values import shown
from dalle_jax.errors import ConfigError

NAMES = ("constant", "linear", "cosine", "cosineP", "powP")
_HIGHEST_POWER = 1000


def check_schedule(name: str | None, where: str = "guidance_schedule") -> None:
    """Checks the name of a guidance schedule; None stands for the prior's default.

    Raises:
      ConfigError: an unknown name; the message lists the known ones.
    """
    if name is not None and _parsed(name) is None:
        raise ConfigError(
            f"{where} is {shown(name)}; expected one of {', '.join(NAMES)} with a number P above 0 and up to "
            f"{_HIGHEST_POWER}, such as pow2.75, or None for the prior's default."
        )


def _parsed(name: str) -> tuple[str, float] | None:
    """Splits a name into its kind and its power; None if it is unknown."""
    if name in ("constant", "linear", "cosine"):
        return name, 1.0
    kind = next((kind for kind in ("cosine", "pow") if name.startswith(kind)), None)
    try:
        power = float(name[len(kind or "") :]) if kind else 0.0
    except ValueError:
        return None
    return (kind, power) if kind and 0 < power <= _HIGHEST_POWER else None


@functools.partial(jax.tree_util.register_dataclass, data_fields=["scale"], meta_fields=["schedule"])
@dataclasses.dataclass(frozen=True)
class Guidance:
    """The scale of guidance over the steps. The schedule is static in a compiled program, the scale is traced.

    Attributes:
      scale: s, the scale of the last step, float32 scalar.
      schedule: a name of `check_schedule`.
    """

    scale: ArrayLike
    schedule: str

    def at(self, ratio: Float[ArrayLike, ""]) -> Float[Array, ""]:
        """Computes s·f(r), float32 scalar.

        Args:
          ratio: r, the share of the steps that are done after this one, in (0, 1].
        """
        if self.schedule == "constant":
            return self.scale
        if self.schedule == "linear":
            return self.scale * ratio
        kind, power = _parsed(self.schedule)
        raised = ratio if power == 1 else jnp.asarray(ratio, jnp.float32) ** power
        return self.scale * (raised if kind == "pow" else (1 - jnp.cos(math.pi * raised)) / 2)


def guide(
    conditional: Float[ArrayLike, "*axes"], null: Float[ArrayLike, "*axes"], scale: Float[ArrayLike, ""]
) -> Float[ArrayLike, "*axes"]:
    """Applies classifier-free guidance to logits (Muse, arXiv 2301.00704, section 2.7).

    Args:
      conditional: logits given the caption, float32.
      null: logits given the empty or negative caption, float32 of the same shape.
      scale: s, float32 scalar.

    Returns:
      (1 + s)·conditional - s·null.
    """
    return (1 + scale) * conditional - scale * null
