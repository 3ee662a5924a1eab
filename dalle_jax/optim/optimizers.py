"""AdamW with clipping, gradient accumulation over slices of the batch, and an EMA of the parameters.

Two choices differ from the usual optax recipe:

- The learning rate is not part of the transformation. `training/step.py` evaluates all schedules at `state.step`, so
  that the logged values are those that were used, also after skipped updates.
- Accumulation is a scan over slices of the batch inside one compiled step. Therefore one step is one update, whatever
  the memory of the device.

The structure of the optimizer state does not depend on the options, so that clipping or weight decay can change when a
run resumes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dalle_jax.configuration.options import check
from dalle_jax.configuration.values import finite
from dalle_jax.errors import ConfigError
from dalle_jax.pytree import PyTree

_OF_PARTS = {"b1": 1.0, "b2": 1.0, "clip_norm": math.inf}  # keys of `parts`, and the number that each stays below


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Options of AdamW.

    Attributes:
      b1, b2, eps: as in Adam.
      weight_decay: decoupled weight decay, multiplied by the learning rate.
      decay: which parameters decay. "kernels": those whose name ends in "kernel", which leaves out gains, biases and
        embeddings (DALL-E). "weights": all but gains and biases, so embeddings and positions decay (CLIP, section 2.5;
        its logit scale is a gain). "all": every parameter.
      clip_norm: largest global norm of the gradients, or 0 for no clipping.
      accumulate_steps: number of slices of the batch, whose gradients are averaged before the update.
      first_moment: dtype of Adam's first moment of the kernels of layers: "float32", or "bfloat16" for half its memory.
        Gains, biases, embeddings and unembeddings keep 32-bit moments (DALL-E, appendix D.2). The paper also keeps the
        kernels' second moment in 16 bits; here it stays float32.
      clip_variance: largest value of Adam's second moment, which is clipped before it is stored and used, or 0 for no
        clipping. DALL-E clips it at 5 (appendix B.2).
      scales: factors of the learning rate by first name of a parameter's path, such as {"encoder": 0.02}. Default: 1.
      parts: own values of b1, b2 and clip_norm, by first name of a parameter's path, such as {"discriminator": {"b1":
        0.0}}. Gradients of a part that stands here, also with an empty mapping, are clipped by their own norm, and do
        not count in that of the others.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: str = "kernels"
    clip_norm: float = 0.0
    accumulate_steps: int = 1
    first_moment: str = "float32"
    clip_variance: float = 0.0
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        choices = {"decay": ("kernels", "weights", "all"), "first_moment": ("float32", "bfloat16")}
        check(
            self, "optimizer", positive=["accumulate_steps", "eps"],
            at_least_0=["clip_norm", "weight_decay", "clip_variance"],
            below_1=["b1", "b2"], choices=choices,
        )  # fmt: skip
        for name, scale in self.scales.items():
            finite(f"config.optimizer.scales.{name}", scale, 0)
        for name, values in self.parts.items():
            for key, value in values.items():
                if key not in _OF_PARTS:
                    raise ConfigError(
                        f"config.optimizer.parts.{name} has the key {key!r}; expected some of {', '.join(_OF_PARTS)}."
                    )
                finite(f"config.optimizer.parts.{name}.{key}", value, 0, below=_OF_PARTS[key])


def make_optimizer(options: OptimizerOptions) -> optax.GradientTransformation:
    """Builds the transformation from gradients to the AdamW direction, without the factor -learning_rate."""
    return optax.chain(
        optax.stateless(lambda gradients, _: _by_part(_clipped, options, gradients)),
        _scale_by_adam(options),
        optax.add_decayed_weights(options.weight_decay, mask=lambda params: decay_mask(params, options)),
        optax.stateless(lambda updates, _: _scaled(updates, options.scales)),
    )


def _by_part(compute: Callable[..., PyTree], options: OptimizerOptions, *trees: PyTree) -> PyTree:
    """Computes a tree from trees of the parameters' structure, one part after the other.

    Args:
      compute: maps options, and the same part of each tree, to a tree like this part.
      options: options of the parts without an entry in `options.parts`, which are computed together.
      *trees: the trees.

    Raises:
      ConfigError: the model has no part of a name in `options.parts`.
    """
    if not options.parts:
        return compute(options, *trees)
    if unknown := sorted(set(options.parts) - set(trees[0])):
        raise ConfigError(f"optimizer.parts names {unknown[0]!r}; the model's parts are {', '.join(trees[0])}.")
    found = compute(options, *({name: x for name, x in tree.items() if name not in options.parts} for tree in trees))
    for name, values in options.parts.items():
        own = dataclasses.replace(options, parts={}, **values)
        found[name] = compute(own, *(tree[name] for tree in trees))
    return found


def _clipped(options: OptimizerOptions, gradients: PyTree) -> PyTree:
    """Scales gradients down to a global norm of at most `clip_norm`, unless that is 0."""
    if not options.clip_norm:
        return gradients
    return optax.clip_by_global_norm(options.clip_norm).update(gradients, optax.EmptyState())[0]


def _scale_by_adam(options: OptimizerOptions) -> optax.GradientTransformation:
    """Returns `optax.scale_by_adam` with a dtype for each first moment, and with clipped second moments.

    Without these two options, its updates are those of optax to the last bit.
    """

    def stored(moments: PyTree) -> PyTree:
        dtype = lambda path: options.first_moment if _kernel_of_layer(path) else jnp.float32
        return jax.tree_util.tree_map_with_path(lambda path, x: x.astype(dtype(path)), moments)

    def init(params: PyTree) -> optax.ScaleByAdamState:
        zeros = optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), stored(zeros), zeros)

    def update(
        gradients: PyTree, state: optax.ScaleByAdamState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.ScaleByAdamState]:
        del params
        count = optax.safe_increment(state.count)
        first = lambda own, gradients, mu: optax.tree.update_moment(gradients, mu, own.b1, 1)
        second = lambda own, gradients, nu: optax.tree.update_moment_per_elem_norm(gradients, nu, own.b2, 2)
        mu = _by_part(first, options, gradients, optax.tree.cast(state.mu, jnp.float32))
        nu = _by_part(second, options, gradients, state.nu)
        if options.clip_variance:
            nu = jax.tree.map(lambda x: jnp.minimum(x, options.clip_variance), nu)
        means = _by_part(lambda own, mu: optax.tree.bias_correction(mu, own.b1, count), options, mu)
        variances = _by_part(lambda own, nu: optax.tree.bias_correction(nu, own.b2, count), options, nu)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + options.eps), means, variances)
        return updates, optax.ScaleByAdamState(count, stored(mu), nu)

    return optax.GradientTransformation(init, update)


def _kernel_of_layer(path: Any) -> bool:
    """Returns whether a parameter is the kernel of a layer: no gain, bias, embedding or unembedding."""
    return jax.tree_util.keystr(path[-1:], simple=True) == "kernel"


def _scaled(updates: PyTree, scales: Mapping[str, float]) -> PyTree:
    """Multiplies each part of the updates by its factor.

    Raises:
      ConfigError: the model has no part of that name.
    """
    if unknown := sorted(set(scales) - set(updates)):
        raise ConfigError(f"optimizer.scales names {unknown[0]!r}; the model's parts are {', '.join(updates)}.")
    return {name: optax.tree.scale(scales.get(name, 1.0), part) for name, part in updates.items()}


def decay_mask(params: PyTree, options: OptimizerOptions) -> PyTree:
    """Returns a tree of booleans with the structure of `params`: true for parameters that decay."""

    def decays(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if options.decay == "weights":
            return not name.endswith(("scale", "bias"))  # norm/scale and logit_scale are gains
        return options.decay == "all" or name.endswith("kernel")

    return jax.tree_util.tree_map_with_path(decays, params)


def accumulated_gradients(
    loss: Callable[[PyTree, PyTree, jax.Array], tuple[jax.Array, dict[str, jax.Array]]],
    params: PyTree,
    batch: PyTree,
    key: jax.Array,
    steps: int,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Computes the gradients of the mean loss over a batch in `steps` slices.

    Slice i has rows i, i + steps, …, so that each row stays on its device, whatever the mesh.

    Args:
      loss: maps (params, batch, key) to a float32 scalar and scalars to log, which are means over the rows.
      params: the parameters.
      batch: arrays [B, ...], B a multiple of `steps`.
      key: folded with the index of the slice if there are several.
      steps: number of slices.

    Returns:
      The gradients and the scalars with "loss" among them, averaged over slices.
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
    """Options of the exponential moving average (EMA) of the parameters, which evaluation and sampling use.

    Attributes:
      decay: weight of the old average at each EMA update, or 0 to use the parameters themselves.
      every: number of updates between EMA updates.
    """

    decay: float = 0.0
    every: int = 1

    def __post_init__(self):
        check(self, "ema", positive=["every"], below_1=["decay"], most={"every": 10**6})


def update_average(average: PyTree, params: PyTree, step: jax.Array, options: AverageOptions) -> PyTree:
    """Returns the EMA after update number `step`.

    The n-th EMA update uses the decay min(decay, (1 + n) / (10 + n)). Without this warmup, a run of a thousand updates
    at decay 0.999 would keep one third of its random initialisation. The runs of the papers are far past that phase.

    Args:
      average: the EMA before the update.
      params: the current parameters, a tree of the same structure.
      step: int32 scalar, number of updates including this one.
      options: options of the EMA.

    Returns:
      The new EMA, or `average` if `step` is not a multiple of `options.every`.
    """
    renewals = (step // options.every).astype(jnp.float32)
    decay = jnp.minimum(options.decay, (1.0 + renewals) / (10.0 + renewals))
    weight = jnp.where(step % options.every == 0, 1.0 - decay, 0.0)
    return jax.tree.map(lambda old, new: old + weight * (new - old), average, params)
