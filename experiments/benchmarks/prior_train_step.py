"""Times a training step of the autoregressive prior: forward pass, backward pass and AdamW.

It uses random weights and tokens, float32, batch 2, and neither gradient clipping nor EMA, as the compared
implementations. `row_column` has the attention of the paper (row, column, row, row, …, the last convolutional). `dense`
is the same model with dense causal attention.
"""

import sys

import _measure as m  # first: it limits the threads
import _prior
import _training
import numpy as np


def run(attention: str, default_runs: int, runs: int, smoke: bool, batch: int = 2) -> dict:
    prior = _prior.build(smoke=smoke, attention=attention)
    layout = prior.layout
    rows = {
        "text": _prior.random_text(prior, batch),
        "tokens": np.random.default_rng(1).integers(0, layout.image_vocab, (batch, layout.image_length), np.int32),
    }
    line = _training.time_step(_prior.PrecomputedTokens(prior), rows, {}, runs or default_runs, warmup=2)
    tokens = batch * layout.length
    return line | {
        "tokens_per_step": tokens,
        "tokens_per_s": round(tokens / line["median_ms"] * 1e3, 1),
        "shape": _prior.shape(prior, batch),
    }


CASES = {
    "row_column_b2": lambda runs, smoke: run("sparse", 5, runs, smoke),
    "dense_b2": lambda runs, smoke: run("full", 3, runs, smoke),
}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
