"""The priors over (text, image) tokens: the protocol that both heads speak, and the layout of their stream.

    B rows    C captions (B = C·n, the n candidates of a caption side by side)    T text    N image tokens
"""
from __future__ import annotations

from typing import Any, Protocol

import jax

from dalle_jax.priors.layout import TokenLayout

Params = Any


class TokenPrior(Protocol):
    """p(image tokens | text), trained by `loss` and drawn from by `sample`."""

    layout: TokenLayout

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters, boxed with their logical axis names."""

    def loss(self, params: Params, text: jax.Array, tokens: jax.Array, key: jax.Array, *, train: bool):
        """The mean loss of a batch.

        Args:
          text: int32 [B, T], padded by `TokenLayout.pad_text`.
          tokens: int32 [B, N], raster order.
          key: for dropout, dropped captions and masks.
          train: whether those apply.

        Returns:
          float32 [], and float32 scalars by name, `image_nats` (per image token) among them.
        """

    def sample(
        self,
        params: Params,
        text: jax.Array,
        keys: jax.Array,
        *,
        known: tuple[jax.Array, jax.Array] | None = None,
        guidance: float = 0.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        steps: int | None = None,
    ) -> jax.Array:
        """Draws image tokens.

        Args:
          text: int32 [C, T].
          keys: [B] keys, one for each row, B a multiple of C. A row depends on its own key alone, not on the batch
            it was drawn in, nor on the number of devices.
          known: (tokens int32 [B, N], mask bool [B, N]): where the mask is True the token comes back unchanged.
          guidance: s in (1 + s)·conditional - s·null logits; 0 does without the null branch.
          temperature: divides the logits; 0 takes the most likely token.
          top_k: keep the k most likely tokens. top_p: keep the likeliest tokens that together hold this mass.
          steps: number of decoding steps, for priors that have a choice.

        Returns:
          int32 [B, N], in [0, image_vocab).
        """
