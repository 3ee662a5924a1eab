"""The encoder of a prior's condition: a bidirectional transformer whose states the image tokens read.

Without it the condition is the beginning of the prior's own stream, as in DALL-E. With it the trunk reads the states of
the encoder by cross-attention in each layer, as in Parti (arXiv 2206.10789), DALL-E mini, and for its low-resolution
tokens Muse (arXiv 2301.00704, section 2.5). The encoder has the width of the trunk, and its own depth.

    B rows    M positions of the condition    D width
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import ArrayLike, Float, Shaped

from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.models.attention.patterns import Bidirectional
from dalle_jax.models.cross_attention import Memory
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.models.trunk import Trunk
from dalle_jax.priors.embedding import StreamEmbedding
from dalle_jax.token_layout import TokenLayout


@runtime_checkable
class EncoderOptions(Protocol):
    """The part of a prior's options that its encoder uses.

    Attributes:
      trunk: options of the transformer.
      encoder_depth: number of layers of the encoder; 0 for no encoder.
      encoder_padding: number of first positions whose padding is read; None for all. The padding of later positions is
        hidden from the encoder and from the trunk.
    """

    trunk: TransformerOptions
    encoder_depth: int
    encoder_padding: int | None


def check(options: EncoderOptions) -> None:
    """Raises a `ConfigError` if the options of an encoder do not fit each other."""
    if options.encoder_padding is not None and not options.encoder_depth:
        raise ConfigError(
            f"config.model.encoder_padding is {options.encoder_padding} with encoder_depth=0; only an encoder can hide "
            "padding. Set --config.model.encoder_depth=4, for example, or leave encoder_padding out."
        )


def stream(options: EncoderOptions, layout: TokenLayout) -> TokenLayout:
    """Returns the layout of the positions that a prior's trunk runs over, given the layout of the tokens."""
    return layout.with_encoder() if options.encoder_depth else layout


def make(options: EncoderOptions, layout: TokenLayout) -> Trunk | None:
    """Returns the encoder of a prior, or None if it has none."""
    if not options.encoder_depth:
        return None
    depth = options.encoder_depth
    return Trunk(dataclasses.replace(options.trunk, depth=depth), layout.of_encoder(), (Bidirectional(True),) * depth)


def read(
    options: EncoderOptions,
    embedding: StreamEmbedding,
    encoder: Trunk | None,
    rows: Shaped[ArrayLike, "B ..."],
    train: bool = False,
) -> tuple[Float[ArrayLike, "B _ D"], Memory | None]:
    """Reads conditions.

    Args:
      options: options of the prior.
      embedding: its embedding.
      encoder: its encoder, from `make`.
      rows: conditions, such as padded captions, int32 [B, T].
      train: whether dropout applies.

    Returns:
      The embeddings of the positions before the image, [B, T, D], or [B, 1, D] with an encoder. The states of the
      encoder, [B, M, D], or None.
    """
    x = embedding.text(rows, train)
    if encoder is None:
        return x, None
    condition = embedding.layout.condition
    hidden = None if options.encoder_padding is None else condition.padding(rows)
    if hidden is None:
        visible = jnp.ones(x.shape[:2], bool)
    else:
        visible = ~hidden | (jnp.arange(condition.length) < options.encoder_padding)[None]
    states = encoder(constrain(x, "batch", "length", "embed_act"), train, visible=visible)
    return embedding.start_of_image(len(x), train), Memory(states, None if hidden is None else visible)
