"""Priors and conditions by name: builds the prior of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dalle_jax.configuration.options import from_config
from dalle_jax.errors import ConfigError
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.clip_condition import ClipEmbedding
from dalle_jax.priors.condition import Condition, Label, Nothing, Text
from dalle_jax.priors.low_resolution import LowResolution
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.token_layout import TokenLayout

# config.prior → the prior and its options.
PRIORS = {
    "autoregressive": (AutoregressivePrior, AutoregressiveOptions),
    "maskgit": (MaskGITPrior, MaskGITOptions),
}

# config.data.condition → the condition.
CONDITIONS: dict[str, type[Condition]] = {
    kind.name: kind for kind in (Text, Label, Nothing, ClipEmbedding, LowResolution)
}


def make(kind: str, model: Mapping[str, Any] | ConfigDict, layout: TokenLayout) -> TokenPrior:
    """Builds a prior from a configuration.

    Args:
      kind: `config.prior`, "autoregressive" or "maskgit".
      model: `config.model`: fields of the prior's options and, under "trunk", of `TransformerOptions`.
      layout: layout of the token stream.

    Raises:
      ConfigError: an unknown kind, an unknown key or an invalid value.
    """
    options = from_config(options_of(kind), model, "model")
    try:
        return PRIORS[kind][0](layout, options)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from error


def options_of(kind: str) -> type:
    """Returns the options dataclass of a kind of prior.

    Raises:
      ConfigError: no such kind.
    """
    if kind not in PRIORS:
        raise ConfigError(f"config.prior is {kind!r}; expected one of {', '.join(PRIORS)}.")
    return PRIORS[kind][1]


def condition_of(config: Mapping[str, Any] | ConfigDict) -> type[Condition]:
    """Returns the kind of condition that a training configuration names. Earlier versions had captions alone.

    Raises:
      ConfigError: there is no such condition.
    """
    name = config["data"].get("condition", Text.name)
    if name not in CONDITIONS:
        raise ConfigError(f"config.data.condition is {name!r}; expected one of {', '.join(CONDITIONS)}.")
    return CONDITIONS[name]
