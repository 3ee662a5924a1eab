"""The prior of the benchmarks: the sizes of the compared transformers, with the sparse attention of the paper."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np

from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.token_layout import TokenLayout


class PrecomputedTokens:
    """The task of a prior whose batches hold text ids and image tokens: "text", "tokens"."""

    def __init__(self, prior: TokenPrior):
        self.prior, self.frozen = prior, {}

    def init(self, key):
        return self.prior.init(key)

    def loss(self, params, frozen, batch, key, step):
        return self.prior.loss(params, batch["text"], batch["tokens"], key, train=True)


def build(*, smoke: bool, attention: str = "sparse", kind: str = "autoregressive", side: int = 32, scan: bool = False):
    """Builds the prior in float32.

    Args:
      smoke: use tiny sizes.
      attention: "sparse" or "full".
      kind: "autoregressive" or "maskgit".
      side: side of the token grid.
      scan: stack the layers. Our variants for CPUs do not, because a scan copies what it stacks.
    """
    if smoke:
        layout = TokenLayout(Text(64, 8), image_vocab=128, height=4, width=4)
        sizes = dict(width=32, depth=3, heads=2)
    else:
        layout = TokenLayout(Text(4096, 64), image_vocab=8192, height=side, width=side)
        sizes = dict(width=512, depth=8, heads=8)
    trunk = TransformerOptions(activation="geglu", dtype="float32", scan=scan, **sizes)
    if kind == "maskgit":
        return MaskGITPrior(layout, MaskGITOptions(trunk=trunk))
    return AutoregressivePrior(layout, AutoregressiveOptions(trunk=trunk, attention=attention))


def random_params(prior: TokenPrior):
    """Returns freshly initialised parameters."""
    return nn.meta.unbox(jax.jit(prior.init)(jax.random.key(0)))


def random_text(prior: TokenPrior, batch: int) -> np.ndarray:
    """Returns random text ids, int32 [B, T], without padding."""
    layout = prior.layout
    return np.random.default_rng(0).integers(
        0, layout.condition.vocab, (batch, layout.condition.length), dtype=np.int32
    )


def shape(prior: TokenPrior, batch: int) -> dict:
    """Returns the field "shape" of the line."""
    layout, trunk = prior.layout, prior.options.trunk
    return {
        "width": trunk.width, "depth": trunk.depth, "heads": trunk.heads, "head_dim": trunk.size_per_head,
        "activation": trunk.activation, "text": layout.condition.length, "text_vocab": layout.condition.vocab,
        "image_tokens": [layout.height, layout.width], "image_vocab": layout.image_vocab, "batch": batch,
        "attention": [type(p).__name__.lower() for p in prior.options.patterns], "dtype": trunk.dtype,
    }  # fmt: skip
