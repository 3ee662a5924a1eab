"""The `TokenPrior` protocol: a model of the image tokens given a condition, with a loss and a sampler.

    B rows    C conditions    T text    N image tokens    V image vocabulary    E codebook width

Samplers draw B = C·n rows. The n candidates of a condition are adjacent rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Shaped

from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout


@runtime_checkable
class TokenPrior(Protocol):
    """p(image tokens | condition): trained by `loss`, sampled by `sample`.

    Attributes:
      layout: layout of the token stream. Its `condition` is a `Condition`.
      stream: layout of the positions that the model runs over: `layout`, or that with start tokens.
      name: name of the prior in reports.
      any_order: whether a token can be drawn given later tokens, as inpainting needs.
      absent_options: the fields of `SamplingOptions` that this prior does not have, and why, as the end of a message.
      takes_steps: whether `sample` has the option `steps`, and draws several tokens in a step.
      schedules: schedules that the loss depends on, by name; see `Task.schedules`.
    """

    layout: TokenLayout
    stream: TokenLayout
    name: str
    any_order: bool
    takes_steps: bool
    absent_options: Mapping[str, str]
    schedules: Mapping[str, optax.Schedule]

    def init(self, key: Key[Array, ""], codebook: Float[ArrayLike, "V E"] | None = None) -> PyTree:
        """Returns new parameters, boxed with their logical axis names.

        Args:
          key: scalar key.
          codebook: the tokenizer's codebook, float [V, E], which options with `codebook_init` use. With None, all
            entries are random.
        """

    def loss(
        self,
        params: PyTree,
        text: Shaped[ArrayLike, "B ..."],
        tokens: Int[ArrayLike, "B N"],
        key: Key[Array, ""],
        *,
        train: bool,
        valid: Bool[ArrayLike, " B"] | None = None,
        step: Int[ArrayLike, ""] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Computes the mean loss of a batch.

        Args:
          params: unboxed parameters.
          text: conditions of `Condition.of_batch`, such as padded captions, int32 [B, T].
          tokens: image tokens in raster order, int32 [B, N].
          key: key of dropout, dropped conditions and masks.
          train: whether dropout and dropped conditions apply.
          valid: rows that count, bool [B]; None for all.
          step: number of updates before this one, int32 scalar, for `schedules`; None outside training.

        Returns:
          The loss, float32 scalar, and float32 scalars by name. One of them is `image_nats`, nats per image token. A
          scalar is NaN if there is nothing to measure.
        """

    def decoding_steps(self, steps: int | None) -> int:
        """Returns how often `sample` runs the model over the image when its option `steps` has this value."""

    def check_sampling(self, options: SamplingOptions) -> None:
        """Checks sampling parameters before anything is drawn.

        Raises:
          ConfigError: a parameter that this prior does not have, or has with other values.
        """

    def sample(
        self,
        params: PyTree,
        text: Shaped[ArrayLike, "C ..."],
        keys: Key[Array, " B"],
        *,
        known: tuple[Int[ArrayLike, "B N"], Bool[ArrayLike, "B N"]] | None = None,
        negative: Shaped[ArrayLike, "_ ..."] | None = None,
        **options,
    ) -> Int[Array, "B N"]:
        """Draws image tokens.

        Args:
          params: unboxed parameters.
          text: conditions of `Condition.encode`, such as padded captions, int32 [C, T].
          keys: one key per row, [B]; B is a multiple of C. A row depends on its own key only, not on the batch or the
            number of devices.
          known: tokens, int32 [B, N], and mask, bool [B, N]. Tokens under a true mask are returned unchanged.
          negative: conditions that guidance leads away from, [C, ...] or [1, ...]; None for the empty one.
          **options: fields of `sampling.SamplingOptions`, such as temperature, top_k, top_p, guidance and steps.

        Returns:
          Tokens, int32 [B, N], in [0, V).

        Raises:
          ValueError: B is not a multiple of C.
          ConfigError: as `check_sampling`.
        """

    def watch(
        self,
        params: PyTree,
        text: Shaped[ArrayLike, "C ..."],
        keys: Key[Array, " B"],
        *,
        known: tuple[Int[ArrayLike, "B N"], Bool[ArrayLike, "B N"]] | None = None,
        negative: Shaped[ArrayLike, "_ ..."] | None = None,
        **options,
    ) -> Iterator[tuple[Array, float]]:
        """Draws image tokens as `sample` does, and yields them while they are drawn.

        The loop runs in pieces, so that its caller can decode the tokens between them, or stop. The tokens stay on the
        devices until they are read. Arguments and errors as in `sample`.

        Yields:
          Tokens, int32 [B, N], with `layout.mask_id` where none is drawn yet, and the share of the steps that are
          done, in (0, 1]. The last tokens are those of `sample`.
        """
