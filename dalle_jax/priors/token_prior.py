"""The priors over (text, image) tokens: the protocol that both heads speak.

B rows    C captions (B = C·n, the n candidates of a caption side by side)    T text    N image tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import optax

from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout


class TokenPrior(Protocol):
    """p(image tokens | text), trained by `loss` and drawn from by `sample`."""

    layout: TokenLayout
    name: str  # its section in reports
    any_order: bool  # whether a token can be drawn given later ones (inpainting)
    schedules: Mapping[str, optax.Schedule]  # that its loss depends on, by name; see `Task.schedules`

    def init(self, key: jax.Array, codebook: jax.Array | None = None) -> PyTree:
        """Fresh parameters, boxed with their logical axis names.

        Args:
          codebook: the tokenizer's, float [V, C], for options with `codebook_init`; None: random entries all the same.
        """

    def loss(
        self,
        params: PyTree,
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
        params: PyTree,
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
