"""Times autoregressive sampling of 256 tokens by the kind of weights, and measures its memory.

Random weights, batch 1. A case is the dtype of the products, and whether the kernels are int8 (`weights="int8"`).

| field           | meaning                                                                            |
|-----------------|------------------------------------------------------------------------------------|
| weights_mb      | all parameters as `TextToImage.load` holds them                                    |
| bytes_per_param | weights_mb by the number of parameters                                             |
| temporaries_mb  | memory that the program needs in addition, which holds the kernels in its own order |
"""

import sys

import _measure as m  # first: it limits the threads
import _prior
import jax
import jax.numpy as jnp

from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.decoding_weights import for_drawing


def run(dtype: str, weights: str | None, runs: int, smoke: bool) -> dict:
    base = _prior.build(smoke=smoke, side=16)
    trunk = {**vars(base.options.trunk), "dtype": dtype}
    prior = AutoregressivePrior(base.layout, AutoregressiveOptions(type(base.options.trunk)(**trunk)))
    params = _prior.random_params(prior)
    count = m.count(params)
    prior, params = for_drawing(prior, params, None, weights)
    text = jnp.asarray(_prior.random_text(prior, 1))
    keys = jax.random.split(jax.random.key(0), 1)
    program, _ = m.compiled(jax.jit(prior.sample), params, text, keys)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    line = m.measure(lambda: program(params, text, keys), runs or 5)
    return line | {
        "weights_mb": round(held / 2**20, 1),
        "bytes_per_param": round(held / count, 2),
        "temporaries_mb": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "params": count,
        "shape": _prior.shape(prior, 1),
    }


CASES = {
    f"{dtype}{'_int8' if weights else ''}": lambda runs, smoke, how=(dtype, weights): run(*how, runs, smoke)
    for dtype in ("float32", "bfloat16")
    for weights in (None, "int8")
}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
