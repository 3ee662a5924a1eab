"""Measures the memory of MaskGIT sampling with the compiler alone: 64 rows, 256 tokens, 8,192 or 16,384 classes.

It compiles the decoder and runs nothing. `flat` computes all logits of a step at once and draws with one cumulative sum
over the vocabulary, as small vocabularies are drawn. `weights` converts the parameters of a bfloat16 prior of width 768
and depth 24 as `TextToImage.load` does.

| field           | meaning                                                         |
|-----------------|-----------------------------------------------------------------|
| temporaries_mb  | memory that the program needs in addition to its arguments      |
| logits_mb       | one float32 array of the logits of all rows, tokens and classes |
| bytes_per_param | bytes of all parameters by their number                         |
"""

import sys

import _measure as m  # first: it limits the threads
import _prior
import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.priors import sampling
from dalle_jax.priors.condition import Text
from dalle_jax.priors.decoding_weights import for_drawing
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.token_layout import TokenLayout


def run(vocab: int, flat: bool, smoke: bool) -> dict:
    rows, side = (4, 4) if smoke else (64, 16)
    options = _prior.build(smoke=smoke, kind="maskgit", scan=True).options
    prior = MaskGITPrior(TokenLayout(Text(4096, 64), vocab, side, side), options)
    if flat:
        sampling.SMALL_VOCABULARY = vocab
    params = nn.meta.unbox(jax.eval_shape(prior.init, jax.random.key(0)))
    text = jax.ShapeDtypeStruct((1, prior.layout.condition.length), jnp.int32)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    sample = lambda params, text, keys: prior.sample(params, text, keys, guidance=3.0, top_p=0.9)
    program, compile_s = m.compiled(jax.jit(sample), params, text, keys)
    return {
        "temporaries_mb": round(program.memory_analysis().temp_size_in_bytes / 2**20),
        "logits_mb": round(rows * side**2 * vocab * 4 / 2**20),
        "compile_s": round(compile_s, 1),
        "params": m.count(params),
        "shape": _prior.shape(prior, rows) | {"guidance": 3.0, "top_p": 0.9},
    }


def weights(smoke: bool) -> dict:
    sizes = dict(width=32, depth=2, heads=2) if smoke else dict(width=768, depth=24, heads=12)
    prior = MaskGITPrior(TokenLayout(Text(4096, 64), 8192, 16, 16), MaskGITOptions(TransformerOptions(**sizes)))
    shapes = nn.meta.unbox(jax.eval_shape(prior.init, jax.random.key(0)))
    loaded = for_drawing(prior, jax.tree.map(lambda x: jnp.zeros(x.shape), shapes), make_mesh(data=1))[1]
    count = m.count(loaded)
    in_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(loaded))
    return {"params": count, "bytes_per_param": round(in_bytes / count, 2), "shape": _prior.shape(prior, 1)}


CASES = {
    f"{vocab}{'_flat' if flat else ''}": lambda runs, smoke, how=(vocab, flat): run(*how, smoke)
    for vocab in (8192, 16_384)
    for flat in (False, True)
} | {"weights": lambda runs, smoke: weights(smoke)}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
