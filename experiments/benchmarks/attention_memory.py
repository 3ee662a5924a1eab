"""Memory of one attention layer of MaskGIT, forward and backward, by XLA's analysis of the compiled program.

    JAX_PLATFORMS=cpu python experiments/benchmarks/attention_memory.py

One image, 64 text tokens, 12 heads of 64 in float32. "All scores" keeps the scores of all queries, as grids of up to
1,024 tokens do. "Blocks" attends block by block. Nothing runs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dalle_jax.models.attention import xla
from dalle_jax.models.attention.patterns import Bidirectional
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout


def mib(side: int, most_scores: int) -> float:
    """Returns the temporaries of the program in MiB, for side x side image tokens."""
    xla.MOST_SCORES = most_scores
    layout = TokenLayout(Text(9, 64), image_vocab=9, height=side, width=side)
    x = jax.ShapeDtypeStruct((1, layout.length, 12, 64), jnp.float32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.square(xla.attend(q, k, v, Bidirectional(), layout)).sum()

    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    return program.memory_analysis().temp_size_in_bytes / 2**20


if __name__ == "__main__":
    print("| Image tokens | Blocks, MiB | All scores, MiB |\n|---|---|---|")
    for side in (32, 48, 64, 96):
        print(f"| {side * side:,} | {mib(side, 2**21):,.0f} | {mib(side, 2**40):,.0f} |")
