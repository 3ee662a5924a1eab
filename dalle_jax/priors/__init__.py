"""The priors over (text, image) tokens: the protocol that both heads speak.

B rows    C captions (B = C·n, the n candidates of a caption side by side)    T text    N image tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import optax

from dalle_jax.configuration.options import from_config
from dalle_jax.errors import ConfigError
from dalle_jax.models.transformer import TransformerOptions
from dalle_jax.token_layout import TokenLayout

Params = Any


class TokenPrior(Protocol):
    """p(image tokens | text), trained by `loss` and drawn from by `sample`."""

    layout: TokenLayout
    name: str  # its section in reports
    any_order: bool  # whether a token can be drawn given later ones (inpainting)
    schedules: Mapping[str, optax.Schedule]  # that its loss depends on, by name; see `Task.schedules`

    def init(self, key: jax.Array, codebook: jax.Array | None = None) -> Params:
        """Fresh parameters, boxed with their logical axis names.

        Args:
          codebook: the tokenizer's, float [V, C], for options with `codebook_init`; None: random entries all the same.
        """

    def loss(
        self,
        params: Params,
        text: jax.Array,
        tokens: jax.Array,
        key: jax.Array,
        *,
        train: bool,
        valid: jax.Array | None = None,
        step: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The mean loss of a batch.

        Args:
          text: int32 [B, T], padded by `TokenLayout.pad_text`.
          tokens: int32 [B, N], raster order.
          key: for dropout, dropped captions and masks.
          train: whether those apply.
          valid: bool [B], rows that count; None for all.
          step: int32 [], updates before this one, for `schedules`; None outside training.

        Returns:
          float32 [], and float32 scalars by name, `image_nats` (per image token) among them; nan: nothing to measure.
        """

    def decoding_steps(self, steps: int | None) -> int:
        """How many times `sample` runs the model over the image, told `steps`."""

    def sample(
        self,
        params: Params,
        text: jax.Array,
        keys: jax.Array,
        *,
        known: tuple[jax.Array, jax.Array] | None = None,
        negative: jax.Array | None = None,
        **options,
    ) -> jax.Array:
        """Draws image tokens.

        Args:
          text: int32 [C, T].
          keys: [B] keys, one for each row, B a multiple of C. A row depends on its own key alone, not on the batch
            it was drawn in, nor on the number of devices.
          known: (tokens int32 [B, N], mask bool [B, N]): where the mask is True the token comes back unchanged.
          negative: int32 [C, T] or [1, T], what guidance leads away from; None: the empty caption.
          **options: fields of `sampling.SamplingOptions`: temperature, top_k, top_p, guidance, steps, and so on.

        Returns:
          int32 [B, N], in [0, image_vocab).
        """


def make(kind: str, model: Mapping[str, Any], layout: TokenLayout) -> TokenPrior:
    """Builds a prior from a configuration.

    Args:
      kind: `config.prior`, "autoregressive" or "maskgit".
      model: `config.model`, fields of the prior's options and, under "trunk", of `TransformerOptions`.
      layout: of its stream.

    Raises:
      ConfigError: an unknown kind, or a key or value that the options refuse.
    """
    from dalle_jax.priors import autoregressive, maskgit  # here, not above: the heads import this package's protocol

    known = {
        "autoregressive": (autoregressive.AutoregressivePrior, autoregressive.AutoregressiveOptions),
        "maskgit": (maskgit.MaskGITPrior, maskgit.MaskGITOptions),
    }
    if kind not in known:
        raise ConfigError(f"config.prior is {kind!r}; expected one of {', '.join(known)}.")
    prior, options = known[kind]
    try:
        trunk = from_config(TransformerOptions, model["trunk"], "model.trunk")
        return prior(layout, from_config(options, {**model, "trunk": trunk}, "model"))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from error
