"""The measured models on a GPU, and tiny ones to try the script on a CPU."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout


def layout(side: int, tiny: bool) -> TokenLayout:
    """Returns a layout of 64 text tokens and a grid of `side` rows of image tokens with 8,192 codes."""
    if tiny:
        return TokenLayout(Text(64, 8), image_vocab=128, height=4, width=4)
    return TokenLayout(Text(16_384, 64), image_vocab=8192, height=side, width=side)


def _trunk(tiny: bool, width: int, depth: int, heads: int, **options) -> TransformerOptions:
    sizes = dict(width=32, depth=3, heads=2) if tiny else dict(width=width, depth=depth, heads=heads)
    return TransformerOptions(**sizes, **{"activation": "gelu", "dtype": "bfloat16", **options})


def autoregressive(tiny: bool, remat: str = "dots", attention: str = "sparse", **trunk) -> AutoregressivePrior:
    """Returns a prior of one billion parameters over 64 + 1,024 tokens: width 2,048, depth 20."""
    options = AutoregressiveOptions(trunk=_trunk(tiny, 2048, 20, 16, remat=remat, **trunk), attention=attention)
    return AutoregressivePrior(layout(32, tiny), options)


def maskgit(tiny: bool, side: int, remat: str = "dots", **trunk) -> MaskGITPrior:
    """Returns a MaskGIT of 170 million parameters in its blocks: width 768, depth 24."""
    return MaskGITPrior(layout(side, tiny), MaskGITOptions(trunk=_trunk(tiny, 768, 24, 12, remat=remat, **trunk)))


def dvae(tiny: bool, size: int, dtype: str = "bfloat16") -> DVAETokenizer:
    """Returns the paper's dVAE for images of `size` pixels. It halves the resolution three times."""
    small = dict(hidden=8, blocks_per_group=1, vocab_size=128, codebook_dim=8, image_size=32) if tiny else {}
    return DVAETokenizer(DVAEOptions(**{"image_size": size, "dtype": dtype, **small}))


def random_params(model: TokenPrior | DVAETokenizer) -> PyTree:
    """Returns freshly initialised parameters on the device."""
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(0)))


def random_text(prior: TokenPrior, rows: int) -> jax.Array:
    """Returns random text ids, int32 [rows, T], without padding."""
    shape = (rows, prior.layout.condition.length)
    return jnp.asarray(np.random.default_rng(0).integers(0, prior.layout.condition.vocab, shape, dtype=np.int32))


def random_tokens(prior: TokenPrior, rows: int) -> jax.Array:
    """Returns random image tokens, int32 [rows, N]."""
    shape = (rows, prior.layout.image_length)
    return jnp.asarray(np.random.default_rng(1).integers(0, prior.layout.image_vocab, shape, dtype=np.int32))


def with_dtype(prior: TokenPrior, dtype: str) -> TokenPrior:
    """Returns the prior with activations of another dtype."""
    options = prior.options
    changed = dataclasses.replace(options, trunk=dataclasses.replace(options.trunk, dtype=dtype))
    return type(prior)(prior.layout, changed)
