"""The parameters of a prior that only draws: one layer after another, in the dtype of their products.

Training needs float32 parameters. A bfloat16 model casts a kernel to bfloat16 wherever it multiplies with it, so a
float32 copy is of no use for drawing. The converted model gives the same tokens.

| Parameter                          | Dtype in a converted model                                    |
|------------------------------------|---------------------------------------------------------------|
| kernels of the trunk and the head  | `trunk.dtype`                                                 |
| untied heads                       | `trunk.states_dtype`                                          |
| gains, biases and embedding tables | float32, because the model uses them in float32               |

A tied head is an embedding table. Float32 models are not converted, so that their draws stay the same to the last bit.
Kernels of dense layers that a file stores in 16 bits stay so in memory, because their layers cast them exactly. Other
parameters in 16 bits become float32.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dalle_jax.distributed.sharding import shardings_of
from dalle_jax.models.trunk import unstack, unstacked_options
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree

_HEADS = ("image_head_kernel", "text_head_kernel")


def for_drawing(prior: TokenPrior, params: PyTree, mesh: Mesh | None) -> tuple[TokenPrior, PyTree]:
    """Converts a prior and its parameters.

    Args:
      prior: the prior. Its options have a `trunk`.
      params: unboxed parameters, a nested dict of float32 arrays on `mesh`. Its leaves are replaced one by one, so that
        memory never holds two copies of all of them. Do not use it after the call.
      mesh: the mesh, or None for the default device.

    Returns:
      The prior with the options of the new layers, and its parameters. They are split over the mesh as those of its
      `init` are.
    """
    trunk = prior.options.trunk
    if trunk.dtype == "float32":
        return prior, _widened(params)
    for part in ("trunk", "head"):
        _cast(params.get(part, {}), ("kernel",), trunk.dtype)
    _cast(params["embedding"], _HEADS, trunk.states_dtype)
    prior = dataclasses.replace(prior, options=unstacked_options(prior.options))
    if "units" in params["trunk"]:
        boxed = jax.eval_shape(prior.init, jax.random.key(0))["trunk"]
        layout = None if mesh is None else shardings_of(boxed, mesh)
        params["trunk"] = jax.jit(unstack, out_shardings=layout)(params["trunk"])
    return prior, params


def _widened(tree: PyTree) -> PyTree:
    """Returns the tree with float32 in place of 16 bits, except in the kernels of dense layers."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found[name] = _widened(value)
        else:
            found[name] = value if name == "kernel" or value.dtype == jnp.float32 else value.astype(jnp.float32)
    return found


def _cast(tree: PyTree, names: tuple[str, ...], dtype: DTypeLike) -> None:
    """Replaces the leaves with these names by copies in `dtype`."""
    for name, value in tree.items():
        if isinstance(value, dict):
            _cast(value, names, dtype)
        elif name in names:
            tree[name] = value.astype(dtype)
