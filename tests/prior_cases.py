"""Small priors of every kind, and functions that their tests share."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.token_layout import TokenLayout

LAYOUT = TokenLayout(Text(10, 4), image_vocab=16, height=3, width=4)
T, N, V = LAYOUT.condition.length, LAYOUT.image_length, LAYOUT.image_vocab


def trunk_of(**changes):
    return TransformerOptions(**{"width": 16, "depth": 2, "heads": 2, "dtype": "float32", "scan": False, **changes})


def autoregressive(trunk=None, **options):
    return AutoregressivePrior(LAYOUT, AutoregressiveOptions(trunk_of(**(trunk or {})), **{"kernel": 3, **options}))


def maskgit(trunk=None, **options):
    return MaskGITPrior(LAYOUT, MaskGITOptions(trunk_of(**(trunk or {})), **{"steps": 4, **options}))


PRIORS = {
    "autoregressive": autoregressive(),
    "any order": autoregressive(attention="full", order="random"),
    "start tokens": autoregressive(start_tokens=True, tied_embeddings=True),
    "any order, neighbours": autoregressive(attention="full", order="random", neighbour_kernel=3),
    "diagonal": autoregressive(attention="full", order="diagonal", neighbour_kernel=3),
    "any order, start tokens": autoregressive(attention="full", order="random", start_tokens=True),
    "shifted": autoregressive(
        dict(norm_placement="sandwich", final_norms=2, qkv_bias=True, activation="gelu_tanh"), wrap=False, torus=True,
        shifted=True, head_bias=True, padding_classes=True,
    ),
    "maskgit": maskgit(),
    "maskgit, published": maskgit(
        dict(
            norm_placement="post", norm_epsilon=1e-12, embedding_norm=True, final_norms=0, qkv_bias=True,
            positions="table", activation="gelu_tanh",
        ),
        head_activation="gelu_tanh", text_reads_image=True,
    ),
    "maskgit, small data": maskgit(head="linear", tied_embeddings=False, neighbour_kernel=3),
}  # fmt: skip


def changed(prior, trunk=None, **options):
    """The same prior with other options."""
    new = dataclasses.replace(prior.options, **options)
    return dataclasses.replace(
        prior, options=dataclasses.replace(new, trunk=dataclasses.replace(new.trunk, **(trunk or {})))
    )


def drawn(prior, scale=0.3):
    """Draws random parameters of a prior, large enough for every input to matter."""
    rng = np.random.default_rng(2)
    shapes = nn.meta.unbox(jax.eval_shape(prior.init, jax.random.key(0)))

    def draw(path, leaf):
        around = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (around + scale * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def params_of(prior):
    return drawn(prior)


def rows(count, seed=0, layout=LAYOUT):
    """Random captions, int32 [count, T], and tokens, int32 [count, N]."""
    rng = np.random.default_rng(seed)
    ids = layout.condition
    captions = [rng.integers(0, ids.vocab, rng.integers(1, ids.length + 1)) for _ in range(count)]
    tokens = rng.integers(0, layout.image_vocab, (count, layout.image_length), dtype=np.int32)
    return np.stack([ids.pad(caption) for caption in captions]), tokens


@functools.partial(jax.jit, static_argnums=0)
def cached_logits(prior, params, text, tokens):
    """Image logits of an autoregressive prior of unscanned layers, from its decode caches: [C·n, N, V]."""
    bound = functools.partial(prior.model.apply, {"params": params})
    first_cells = jnp.zeros(len(text), jnp.int32) if prior.options.knows_next else None
    first, text_cache = bound(text, first_cells, method="prefill")

    def step(caches, position):
        here, following = (jnp.full(len(tokens), p) for p in (position, position + 1))
        logits, caches = bound(tokens[:, position], position, here, following, text_cache, caches, method="step")
        return caches, logits

    later = jax.lax.scan(step, bound(len(tokens), method="init_cache"), jnp.arange(N - 1))[1]
    first = jnp.repeat(first, len(tokens) // len(text), axis=0)
    return jnp.concatenate([first[None], later]).swapaxes(0, 1)


@functools.partial(jax.jit, static_argnums=(0, 5))
def loss_of(prior, params, text, tokens, key, train, valid=None):
    return prior.loss(params, text, tokens, key, train=train, valid=valid)
