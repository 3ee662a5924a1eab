"""Measures what the machine can do at all, in float32: matrix products, and reading weights for one row.

Training steps and image tokenizers are products of matrices: their arithmetic divided by `matmul`'s rate is the least
time that they can take. Sampling one image reads all weights for each token: their bytes divided by `matvec`'s rate is
the least time for a token.
"""

import sys

import _measure as m  # first: it limits the threads
import jax
import numpy as np


def product(rows: int, inner: int, columns: int, default_runs: int, runs: int, smoke: bool) -> dict:
    """Multiplies [rows, inner] by [inner, columns]."""
    if smoke:
        inner, columns = 64, 64
    rng = np.random.default_rng(0)
    a, b = (jax.numpy.asarray(rng.normal(size=size), "float32") for size in ((rows, inner), (inner, columns)))
    multiply = jax.jit(lambda a, b: a @ b)
    line = m.measure(lambda: multiply(a, b), runs or default_runs, inner=20)
    seconds = line["min_ms"] / 1e3
    return line | {
        "gflops_per_s": round(2 * rows * inner * columns / seconds / 1e9, 1),
        "weights_gb_per_s": round(b.nbytes / seconds / 1e9, 1),
        "shape": {"rows": rows, "inner": inner, "columns": columns},
        "params": b.size,
    }


CASES = {
    "matmul": lambda runs, smoke: product(2176, 512, 2048, 5, runs, smoke),  # a layer of prior_train_step.py
    "matvec": lambda runs, smoke: product(1, 8192, 4096, 5, runs, smoke),  # weights of 128 MiB, beyond any cache
}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
