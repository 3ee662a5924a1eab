"""The parameters of a prior that only draws: one layer after another, in the dtype of their products.

Training needs float32 parameters. A bfloat16 model casts a kernel to bfloat16 wherever it multiplies with it, so a
float32 copy is of no use for drawing. The converted model gives the same tokens.

| Parameter                          | Dtype in a converted model                                    |
|------------------------------------|---------------------------------------------------------------|
| kernels of trunks and of the head  | `trunk.dtype`                                                 |
| untied heads                       | `trunk.states_dtype`                                          |
| gains, biases and embedding tables | float32, because the model uses them in float32               |

A tied head is an embedding table. Float32 models are not converted, so that their draws stay the same to the last bit.
Kernels of dense layers that a file stores in 16 bits stay so in memory, because their layers cast them exactly. Other
parameters in 16 bits become float32.

With `weights="int8"` each kernel of the trunk and the head is one byte per number: round(kernel / scale), with one
float32 scale for each output. The scale is a 127th of the largest absolute value of its column. Products have the dtype
of the trunk as before, so that only memory and the time to read it are saved. The tokens are no longer the same.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float, Int8

from dalle_jax.distributed.sharding import replicated, shardings_of
from dalle_jax.errors import ConfigError
from dalle_jax.models.dense import input_axes
from dalle_jax.models.trunk import TRUNKS, unstack, unstacked_options
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree

WEIGHTS = (None, "int8")
_HEADS = ("image_head_kernel", "text_head_kernel")
_LARGEST = 127  # of int8, symmetric


def check_weights(weights: str | None) -> None:
    """Raises ConfigError for an unknown kind of weights."""
    if weights not in WEIGHTS:
        raise ConfigError(
            f"weights is {weights!r}; expected None (the precision of the prior), or int8 (--config.weights=int8)."
        )


def for_drawing(
    prior: TokenPrior, params: PyTree, mesh: Mesh | None, weights: str | None = None
) -> tuple[TokenPrior, PyTree]:
    """Converts a prior and its parameters.

    Args:
      prior: the prior. Its options have a `trunk`.
      params: unboxed parameters, a nested dict of float32 arrays on `mesh`. Its leaves are replaced one by one, so that
        memory never holds two copies of all of them. Do not use it after the call.
      mesh: the mesh, or None for the default device.
      weights: None, or "int8"; see the top of this file.

    Returns:
      The prior with the options of the new layers, and its parameters. They are split over the mesh as those of its
      `init` are.
    """
    trunk, stacked = prior.options.trunk, [name for name in TRUNKS if "units" in params.get(name, {})]
    if trunk.dtype == "float32":
        params = _widened(params)
        if weights is None:
            return prior, params
    for part in (*TRUNKS, "head"):
        if weights is None:
            _cast(params.get(part, {}), ("kernel",), trunk.dtype)
        else:
            _quantize(params.get(part, {}))
    _cast(params["embedding"], _HEADS, trunk.states_dtype)
    prior = dataclasses.replace(prior, options=unstacked_options(prior.options))
    for name in stacked:
        boxed = jax.eval_shape(prior.init, jax.random.key(0))[name]
        layout = None if mesh is None else shardings_of(boxed, mesh)
        if layout is not None and weights is not None:
            _add_scales(layout, replicated(mesh))
        params[name] = jax.jit(unstack, out_shardings=layout)(params[name])
    return prior, params


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantized(kernel: Float[ArrayLike, ...], inputs: int, stacked: bool) -> tuple[Int8[Array, ...], Float[Array, ...]]:
    """Rounds a kernel to int8 with one scale for each output.

    Args:
      kernel: [*inputs, *outputs], with a leading axis of layers if `stacked`.
      inputs: number of input axes.
      stacked: whether there is an axis of layers.

    Returns:
      int8 of the kernel's shape, and the scales, float32 [*outputs], or [layers, *outputs]. Their product is the kernel
      up to half a scale.
    """
    axes = tuple(range(stacked, stacked + inputs))
    kernel = kernel.astype(jnp.float32)
    most = jnp.abs(kernel).max(axes, keepdims=True)
    scale = jnp.where(most > 0, most, 1.0) / _LARGEST
    return jnp.round(kernel / scale).astype(jnp.int8), scale.squeeze(axes)


def _quantize(tree: PyTree, name: str = "", stacked: bool = False) -> None:
    """Replaces each kernel by its int8 numbers, and adds their scales next to it."""
    for key, value in list(tree.items()):
        if isinstance(value, dict):
            _quantize(value, key, stacked or key == "units")
        elif key == "kernel":
            tree[key], tree["kernel_scale"] = quantized(value, input_axes(name), stacked)


def _add_scales(layout: PyTree, sharding: jax.sharding.Sharding) -> None:
    """Adds a sharding for the scales next to that of each kernel."""
    for value in list(layout.values()):
        if isinstance(value, dict):
            _add_scales(value, sharding)
    if "kernel" in layout:
        layout["kernel_scale"] = sharding


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
