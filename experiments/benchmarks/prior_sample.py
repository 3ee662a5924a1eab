"""Times autoregressive sampling of all 1,024 image tokens of a caption, including the prefill of the text.

It uses random weights, float32, a top_k of half the vocabulary, and batches of 1 and 8 with one caption per row.
`guided` adds guidance, which runs each row twice. `candidates` samples eight images of one caption, which share its
text cache.
"""

import sys

import _measure as m  # first: it limits the threads
import _prior
import jax
import jax.numpy as jnp
import numpy as np


def run(rows: int, captions: int, guidance: float, default_runs: int, runs: int, smoke: bool) -> dict:
    prior = _prior.build(smoke=smoke)
    params = _prior.random_params(prior)
    text = jnp.asarray(_prior.random_text(prior, captions))
    vocab, length = prior.layout.image_vocab, prior.layout.image_length

    @jax.jit
    def sample(params, text, keys):
        return prior.sample(params, text, keys, guidance=guidance, top_k=vocab // 2)

    program, compile_s = m.compiled(sample, params, text, jax.random.split(jax.random.key(0), rows))
    seeds = iter(range(1_000_000))
    draw = lambda: program(params, text, jax.random.split(jax.random.key(next(seeds)), rows))
    first, again = np.asarray(program(params, text, jax.random.split(jax.random.key(0), rows))), np.asarray(draw())
    assert first.shape == (rows, length) and first.max() < vocab and (first == again).all()
    line = m.measure(draw, runs or default_runs, warmup=0)
    per_token = line["median_ms"] / length
    return line | {
        "compile_s": round(compile_s, 2),
        "ms_per_token": round(per_token, 3),
        "tokens_per_s": round(rows / per_token * 1e3, 1),
        "params": m.count(params),
        "shape": _prior.shape(prior, rows) | {"captions": captions, "guidance": guidance, "top_k": vocab // 2},
    }


CASES = {
    "b1": lambda runs, smoke: run(1, 1, 0.0, 3, runs, smoke),
    "b8": lambda runs, smoke: run(8, 8, 0.0, 2, runs, smoke),
    "b1_guided": lambda runs, smoke: run(1, 1, 3.0, 2, runs, smoke),
    "b8_candidates": lambda runs, smoke: run(8, 1, 0.0, 2, runs, smoke),
}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
