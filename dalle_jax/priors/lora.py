"""Low-rank adapters of a prior's trunk (LoRA, arXiv 2106.09685), for fine-tuning with a frozen base.

Each dense kernel W of the trunk becomes W + alpha/rank · down · up. `down` and `up` are the only trained parameters. At
the start `up` is zero, so that the first update begins at the base. The adapters are merged into the kernels inside
the loss and once at loading, so that models know nothing of them and drawing costs nothing.

    I inputs of a kernel    O its outputs    R rank    L layers of a scan
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from dalle_jax.configuration.options import check
from dalle_jax.pytree import PyTree, by_path, nested

_TRUNK, _KERNEL = "trunk/", "/kernel"


@dataclasses.dataclass(frozen=True)
class LoRAOptions:
    """Options of the adapters.

    Attributes:
      rank: R, or 0 to train all parameters without adapters.
      alpha: numerator of the scale of the adapters, alpha/rank.
    """

    rank: int = 0
    alpha: float = 16.0

    def __post_init__(self):
        check(self, "lora", at_least_0=["rank"], positive=["alpha"], most={"rank": 2**13, "alpha": 1e6})


def init(key: Key[Array, ""], base: PyTree, options: LoRAOptions) -> PyTree:
    """Returns new adapters.

    Args:
      key: scalar key.
      base: parameters of the prior, or their shapes.
      options: see `LoRAOptions`; the rank is above 0.

    Returns:
      A nested dict with the paths of the trunk's kernels: "down", float32 [I, R], and "up", zeros [R, O]. Those of a
      scan have a leading axis of L layers.
    """
    adapters = {}
    for number, (path, kernel) in enumerate(sorted(_kernels(base).items())):
        leading, inputs, outputs = _shape(path, kernel.shape)
        scale = inputs**-0.5
        normal = jax.random.normal(jax.random.fold_in(key, number), (*leading, inputs, options.rank))
        adapters[f"{path}/down"] = scale * normal
        adapters[f"{path}/up"] = jnp.zeros((*leading, options.rank, outputs))
    return nested(adapters)


def merge(base: PyTree, adapters: PyTree, options: LoRAOptions) -> PyTree:
    """Adds adapters to the kernels that they belong to.

    Args:
      base: float32 parameters of the prior.
      adapters: of the structure of `init(key, base, options)`.
      options: see `LoRAOptions`.

    Returns:
      Parameters of the prior. Leaves without an adapter are those of `base`.
    """
    leaves, flat = by_path(base), by_path(adapters)
    for path, kernel in _kernels(base).items():
        down, up = flat[f"{path}/down"], flat[f"{path}/up"]
        change = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST) * (options.alpha / options.rank)
        leaves[path] = kernel + change.reshape(kernel.shape)
    return jax.tree.unflatten(jax.tree.structure(base), leaves.values())


def _kernels(params: PyTree) -> dict[str, Any]:
    """Returns the dense kernels of the trunk by path."""
    return {p: x for p, x in by_path(params).items() if p.startswith(_TRUNK) and p.endswith(_KERNEL)}


def _shape(path: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """Returns the leading axes of a kernel, which a scan adds, and its numbers of inputs and outputs."""
    leading = shape[:1] if "/units/" in path else ()
    sizes = shape[len(leading) :]
    axes = 2 if path.endswith(f"/out{_KERNEL}") else 1  # attention's output contracts heads and head size
    return leading, int(np.prod(sizes[:axes])), int(np.prod(sizes[axes:]))
