"""AdamW with clipping, gradients accumulated over slices of the batch, and the average of the parameters.

Two choices that differ from the usual optax recipe:

- The step size is not part of the transformation: `train_step.py` evaluates every schedule, this one included, at
  `state.step`, so that what is logged is what was used, also after skipped updates.
- Accumulation runs inside one compiled step (a scan over slices of the batch) instead of over several steps: one
  step is one update, whatever the memory of the device.

The structure of the optimizer's state does not depend on the options, so that clipping or weight decay can change
when a run is resumed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax.configuration.options import check
from dalle_jax.errors import ConfigError
from dalle_jax.pytree import PyTree


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """AdamW's numbers.

    Attributes:
      b1, b2, eps: Adam's.
      weight_decay: decoupled decay, multiplied by the step size as in AdamW.
      decay: which parameters decay: "kernels" (those whose name ends in "kernel": not gains, biases or embeddings)
        or "all".
      clip_norm: largest global norm of the gradients; 0: no clipping.
      accumulate_steps: slices of the batch whose gradients are averaged before the update.
      first_moment: dtype in which Adam's mean of the gradients is kept, "float32" or "bfloat16": half the memory (the
        paper keeps both moments in 16 bits). The mean of their squares stays float32.
      scales: factors on the step size, by the first name of a parameter's path ({"encoder": 0.02}); 1 elsewhere.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: str = "kernels"
    clip_norm: float = 0.0
    accumulate_steps: int = 1
    first_moment: str = "float32"
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        choices = {"decay": ("kernels", "all"), "first_moment": ("float32", "bfloat16")}
        check(self, "optimizer", positive=["accumulate_steps"], at_least_0=["clip_norm"], choices=choices)


def make_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """The transformation from gradients to the AdamW direction, to be multiplied by minus the step size."""
    return optax.chain(
        optax.clip_by_global_norm(options.clip_norm) if options.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=options.b1, b2=options.b2, eps=options.eps, mu_dtype=options.first_moment),
        optax.add_decayed_weights(options.weight_decay, mask=lambda params: decay_mask(params, options)),
        optax.stateless(lambda updates, _: _scaled(updates, options.scales)),
    )


def _scaled(updates: PyTree, scales: Mapping[str, float]) -> PyTree:
    """The updates times the factor of their part of the model.

    Raises:
      ConfigError: a name that no part of the model has.
    """
    if unknown := sorted(set(scales) - set(updates)):
        raise ConfigError(f"optimizer.scales names {unknown[0]!r}; the model's parts are {', '.join(updates)}.")
    return {name: optax.tree.scale(scales.get(name, 1.0), part) for name, part in updates.items()}


def decay_mask(params: PyTree, options: OptimizerOptions) -> PyTree:
    """Booleans with the structure of `params`: which parameters the weight decay applies to."""

    def decays(path: Any, _: Any) -> bool:
        return options.decay == "all" or jax.tree_util.keystr(path[-1:], simple=True).endswith("kernel")

    return jax.tree_util.tree_map_with_path(decays, params)


def accumulated_gradients(
    loss: Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    params: PyTree,
    batch: PyTree,
    key: jax.Array,
    steps: int,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Gradients of the mean loss over a batch, `1/steps` of its rows at a time.

    Slice i takes rows i, i + steps, ...: rows stay on the device that has them, whatever the mesh.

    Args:
      loss: (params, batch, key) -> (float32 scalar, scalars to log), means over the rows given.
      params: what to differentiate by.
      batch: arrays [B, ...], B a multiple of `steps`.
      key: folded with the slice number (unless there is one slice only).
      steps: number of slices.

    Returns:
      Gradients (mean over slices), and the scalars with "loss" among them (means too).
    """

    def gradients(rows: PyTree, key: jax.Array) -> tuple[PyTree, dict[str, jax.Array]]:
        (value, scalars), grads = jax.value_and_grad(loss, has_aux=True)(params, rows, key)
        return grads, {"loss": value, **scalars}

    if steps == 1:
        return gradients(batch, key)

    slices = jax.tree.map(lambda x: x.reshape(x.shape[0] // steps, steps, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: PyTree, part: tuple[PyTree, jax.Array]) -> tuple[PyTree, None]:
        rows, index = part
        return jax.tree.map(jnp.add, total, gradients(rows, jax.random.fold_in(key, index))), None

    one = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], slices), key)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one)
    total, _ = jax.lax.scan(add, zeros, (slices, jnp.arange(steps)))
    return jax.tree.map(lambda x: x / steps, total)


@dataclasses.dataclass(frozen=True)
class AverageOptions:
    """Exponential moving average of the parameters (EMA), the one used for evaluation and generation.

    Attributes:
      decay: weight of the past at each renewal; 0: no average is kept, the parameters themselves are used.
      every: renew after every so many updates.
    """

    decay: float = 0.0
    every: int = 1

    def __post_init__(self):
        check(self, "ema", positive=["every"], below_1=["decay"])


def update_average(average: PyTree, params: PyTree, step: jax.Array, options: AverageOptions) -> PyTree:
    """The average after the update number `step`.

    The n-th renewal uses min(decay, (1 + n) / (10 + n)): without it, a run of a thousand updates at decay 0.999 would
    still be one third its random initialisation.  The papers' runs are far past that phase.

    Args:
      average, params: trees of the same structure, after and before this update of the average.
      step: int32 scalar, number of updates done, this one included.
      options: see `AverageOptions`.

    Returns:
      The renewed average, or the same one where `step` is no multiple of `options.every`.
    """
    renewals = (step // options.every).astype(jnp.float32)
    decay = jnp.minimum(options.decay, (1.0 + renewals) / (10.0 + renewals))
    weight = jnp.where(step % options.every == 0, 1.0 - decay, 0.0)
    return jax.tree.map(lambda old, new: old + weight * (new - old), average, params)
