"""Layouts of published VQGANs: which of their arrays is which of our parameters, and the conversion by such a table.

The published VQGANs have the same layers under other names. A layout is computed from our parameters, so that it holds
for all sizes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from dalle_jax.image_tokenizers.vqgan import VQGANOptions, VQGANTokenizer
from dalle_jax.pretrained import state_dict
from dalle_jax.pytree import PyTree

StateDict = Mapping[str, np.ndarray]
Path = tuple[str, ...]
Layout = Mapping[str, tuple[Path, tuple[int, ...]]]  # original name → path in our tree and original shape
_FLAX_LEVEL, _FLAX_NUMBER = re.compile(r"(down|up)_\d+"), re.compile(r"_(\d+)$")


@functools.cache
def torch_layout(options: VQGANOptions, name_of: Callable[[Path, VQGANOptions], str]) -> Layout:
    """Computes the layout of a PyTorch module, whose kernels are [out, in, height, width].

    Args:
      options: sizes.
      name_of: maps the path of a parameter to its original name.
    """
    table = {}
    for path, shape in _shapes(options).items():
        if path[-1] == "kernel":
            *window, inputs, outputs = (1, 1, *shape) if len(shape) == 2 else shape
            shape = (outputs, inputs, *window)
        table[name_of(path, options)] = path, shape
    return table


@functools.cache
def flax_layout(options: VQGANOptions, name_of: Callable[[Path, VQGANOptions], str]) -> Layout:
    """Computes the layout of a Flax module, whose kernels are [height, width, in, out]; see `torch_layout`."""
    table = {}
    for path, shape in _shapes(options).items():
        window = (1, 1) if path[-1] == "kernel" and len(shape) == 2 else ()
        table[name_of(path, options)] = path, (*window, *shape)
    return table


def from_flax(arrays: StateDict) -> dict[str, np.ndarray]:
    """Renames and transposes the arrays of a Flax port (github.com/patil-suraj/vqgan-jax) as those of the original.

    Its modules are those of taming transformers, with names as `encoder/down_0/block_1/conv1/kernel` for
    `encoder.down.0.block.1.conv1.weight`. The VQGAN of DALL-E mini is published in it.

    Args:
      arrays: arrays by name. Those of other models are returned unchanged.
    """
    if "quantize/embedding/embedding" not in arrays:
        return dict(arrays)
    found = {}
    for name, array in arrays.items():
        *modules, leaf = name.split("/")
        if len(modules) > 2 and _FLAX_LEVEL.fullmatch(modules[1]):
            modules[1:3] = [_FLAX_NUMBER.sub(r".\1", module) for module in modules[1:3]]
        if leaf == "kernel" and array.ndim == 4:
            array = array.transpose(3, 2, 0, 1)
        found[".".join([*modules, "bias" if leaf == "bias" else "weight"])] = array
    return found


def _shapes(options: VQGANOptions) -> dict[Path, tuple[int, ...]]:
    """Returns the shape of each parameter by its path."""
    params = nn.meta.unbox(jax.eval_shape(VQGANTokenizer(options).init, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}


def check(arrays: StateDict, layout: Layout) -> None:
    """Raises a `PretrainedError` unless names and shapes of the arrays are those of the layout."""
    state_dict.check_shapes(arrays, {name: shape for name, (_, shape) in layout.items()})


def fits(arrays: StateDict, layout: Layout) -> bool:
    """Returns whether names and shapes of the arrays are those of the layout."""
    return {name: array.shape for name, array in arrays.items()} == {name: shape for name, (_, shape) in layout.items()}


def convert(arrays: StateDict, layout: Layout, *, channels_first: bool = True) -> PyTree:
    """Renames and transposes arrays.

    Args:
      arrays: arrays by their original names.
      layout: of the original.
      channels_first: whether kernels are those of PyTorch.

    Returns:
      Parameters of `VQGANTokenizer`, float32 numpy arrays.

    Raises:
      PretrainedError: arrays are missing, unexpected, of another shape, or damaged.
    """
    check(arrays, layout)
    converted = {}
    for name, (path, _) in layout.items():
        array = state_dict.as_float32(name, arrays[name])
        if path[-1] == "kernel":
            array = array.transpose(2, 3, 1, 0) if channels_first else array
            array = array[0, 0] if array.shape[:2] == (1, 1) else array
        converted[path] = np.ascontiguousarray(array)
    return traverse_util.unflatten_dict(converted)
