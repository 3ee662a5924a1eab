"""Prints the memory that drawing one image with each published prior needs, by the TPU compiler. It needs no TPU.

    python experiments/published_memory.py [--only mindalle]

No weights are needed either, because a prior follows from its published sizes. The program is that of `TextToImage` for
one row, compiled for one chip of a v5e host. Its memory is that of the parameters and of everything that is in memory
with them. The image tokenizer comes on top: at most 0.3 GiB of float32 parameters.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dalle_jax import compilation_cache
from dalle_jax.aot import topologies
from dalle_jax.aot.topologies import GIB
from dalle_jax.pretrained import dalle_mini, maskgit, mindalle, rudalle
from dalle_jax.pretrained.dalle_mini_layout import prior_of as dalle_mini_prior
from dalle_jax.pretrained.rudalle_layout import prior_of as rudalle_prior
from dalle_jax.priors.decoding_weights import for_drawing
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree

WEIGHTS = {"float32": ("float32", None), "bfloat16": ("bfloat16", None), "int8": ("bfloat16", "int8")}


def priors(dtype: str) -> Iterator[tuple[str, TokenPrior]]:
    """Yields each published prior with its name in the catalogue."""
    for name, (side, steps) in maskgit.PUBLISHED.items():
        yield name, maskgit.prior_of(maskgit.published_sizes(side), 1024, steps, dtype)
    for name, (sizes, _) in dalle_mini.PUBLISHED.items():
        yield name, dalle_mini_prior(sizes, dtype)
    arrays = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in mindalle.shapes(*mindalle.PUBLISHED).items()
    }
    yield mindalle.NAME, mindalle.prior_of(arrays, dtype=dtype)
    for name, (sizes, heads, version, _) in rudalle.PUBLISHED.items():
        yield name, rudalle_prior(sizes, heads, version, dtype)


def for_one_image(prior: TokenPrior, weights: str | None) -> tuple[TokenPrior, PyTree]:
    """Returns the prior as `TextToImage` draws with it, and its parameters as shapes."""
    found = []

    def convert() -> PyTree:
        params = nn.meta.unbox(prior.init(jax.random.key(0)))
        drawing, params = for_drawing(prior, params, None, weights)
        found.append(drawing)
        return params

    params = jax.eval_shape(convert)
    return found[0], params


def size(tree: PyTree) -> int:
    """Returns the bytes of all arrays."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compiled_memory(prior: TokenPrior, params: PyTree) -> int:
    """Returns the bytes that one chip of a v5e host needs to draw the tokens of one image, parameters included."""
    mesh = Mesh(topologies.devices("v5e:2x2")[:1], "data")
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())), tree
    )
    empty = prior.layout.condition.empty()
    given = jax.ShapeDtypeStruct((1, *empty.shape), empty.dtype)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    with compilation_cache.turned_off():
        memory = jax.jit(prior.sample).lower(*map(place, (params, given, keys))).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only models whose names contain this text")
    parser.add_argument("--weights", default="", choices=["", *WEIGHTS], help="only one kind of weights")
    arguments = parser.parse_args()
    print("| Name | Weights | Parameters of the prior | Their GiB | GiB to draw one image |\n|---|---|---|---|---|")
    for label, (dtype, weights) in WEIGHTS.items():
        for name, prior in priors(dtype):
            if arguments.only not in name or arguments.weights not in ("", label):
                continue
            count = sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(prior.init, jax.random.key(0))))
            prior, params = for_one_image(prior, weights)
            try:
                needed = f"{compiled_memory(prior, params) / GIB:.2f}"
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                needed = "more than the 16 of the chip"
            print(f"| `{name}` | {label} | {count:,} | {size(params) / GIB:.2f} | {needed} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
