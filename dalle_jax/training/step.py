"""The state of a training run and the one compiled function that advances it.

The training loop runs this step. `dalle_jax.aot` lowers the same step from abstract arguments to find its cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Self

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from dalle_jax import keys
from dalle_jax.distributed.sharding import abstract, has_sparse_cores, on_mesh, replicated, shardings_of
from dalle_jax.optim import optimizers
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.pytree import PyTree
from dalle_jax.tasks.task import Task

# With these options the TPU compiler gathers the parameters of one product while it computes another. MaxText publishes
# them for v5p.
OVERLAP = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}
# The compiler starts gathers early while the live arrays take less than this share of the memory. Its default is 95%.
# On v5e, which has no SparseCores, the arrays then took up to 45% more than their live parts, and did not fit.
LEAVE_ROOM = {"xla_tpu_scheduler_percent_shared_memory_limit": 74}
# With these a SparseCore adds up and scatters gradients while the chip computes. MaxText publishes them, too.
SPARSE_CORE = {
    "xla_tpu_enable_reduce_scatter_offload_tracing": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
}


def overlapping(device: jax.Device) -> dict[str, bool | int] | None:
    """Returns the options with which a device's compiler lets exchanges overlap with other work; None for no TPU."""
    if device.platform != "tpu":
        return None
    return OVERLAP | (SPARSE_CORE if has_sparse_cores(device.device_kind) else LEAVE_ROOM)


@flax.struct.dataclass
class TrainState:
    """Everything that training changes.

    Attributes:
      step: int32 scalar, number of steps done, including skipped ones.
      params: float32 parameters.
      ema: their moving average, or None.
      opt_state: state of the optimizer.
      skipped: int32 scalar, number of steps whose update was skipped because it was not finite.
      skipped_in_row: int32 scalar, number of latest steps that were skipped in a row.
    """

    step: jax.Array
    params: PyTree
    ema: PyTree | None
    opt_state: PyTree
    skipped: jax.Array
    skipped_in_row: jax.Array

    def __repr__(self) -> str:  # the arrays would fill pages
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return (
            f"TrainState(step={self.step}, {size:,} parameters, average {'not kept' if self.ema is None else 'kept'})"
        )

    @property
    def eval_params(self) -> PyTree:
        """The parameters for evaluation and generation: the average if it is kept, else `params`."""
        return self.params if self.ema is None else self.ema

    def items(self) -> dict[str, PyTree]:
        """Splits the state into the items of a checkpoint: parameters, average if kept, and the rest."""
        rest = {name: getattr(self, name) for name in ("step", "opt_state", "skipped", "skipped_in_row")}
        average = {} if self.ema is None else {"ema": self.ema}
        return {"params": self.params, "rest": rest, **average}

    @classmethod
    def from_items(cls, items: Mapping[str, PyTree]) -> Self:
        """Builds the state from what `items` returned."""
        return cls(params=items["params"], ema=items.get("ema"), **items["rest"])


@flax.struct.dataclass
class Scalars:
    """The scalars of a step as one array, so that a single copy brings all of them to the host.

    Attributes:
      values: float32 [K], replicated on every device.
      names: their K names.
    """

    values: jax.Array
    names: tuple[str, ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, scalars: Mapping[str, jax.Array]) -> Self:
        """Stacks scalars. Traced by jit."""
        return cls(jnp.stack([jnp.asarray(value, jnp.float32) for value in scalars.values()]), tuple(scalars))

    def __getitem__(self, name: str) -> jax.Array:
        """Returns one scalar, on the devices."""
        place = self.names.index(name)
        return jax.lax.index_in_dim(self.values, place, keepdims=False)

    def wait(self) -> None:
        """Waits for the step. Copies nothing."""
        self.values.block_until_ready()

    @staticmethod
    def fetch(steps: Sequence[Scalars]) -> list[dict[str, float]]:
        """Copies the scalars of several steps to the host, and waits for them."""
        arrays = jax.device_get([each.values for each in steps])
        return [dict(zip(each.names, array.tolist(), strict=True)) for each, array in zip(steps, arrays, strict=True)]


def make_init(
    task: Task, optimizer: optax.GradientTransformation, average: AverageOptions, mesh: Mesh, seed: int
) -> tuple[Callable[[], TrainState], TrainState]:
    """Returns a function that creates the initial state on the mesh, and the abstract state.

    Args:
      task: creates the parameters.
      optimizer: creates its state.
      average: decides whether a moving average is kept.
      mesh: target of the shardings. Call the function inside `on_mesh(mesh)`.
      seed: seed of the run.

    Returns:
      The function, and the abstract state (`ShapeDtypeStruct`s with shardings). The abstract state suffices to restore
      a checkpoint or to compile.
    """

    def boxed_params() -> PyTree:
        return task.init(keys.stream(jax.random.key(seed), "init"))

    def init() -> TrainState:
        params = nn.meta.unbox(boxed_params())
        ema = jax.tree.map(jnp.copy, params) if average.decay else None
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, params, ema, optimizer.init(params), zero, zero)

    with on_mesh(mesh):
        boxed, shapes = jax.eval_shape(boxed_params), jax.eval_shape(init)
    params = shardings_of(boxed, mesh)
    everywhere = replicated(mesh)
    shardings = TrainState(
        step=everywhere,
        params=params,
        ema=params if average.decay else None,
        opt_state=optax.tree_utils.tree_map_params(
            optimizer, lambda _, sharding: sharding, shapes.opt_state, params, transform_non_params=lambda _: everywhere
        ),
        skipped=everywhere,
        skipped_in_row=everywhere,
    )
    # It runs once. On a CPU, the optimisation of its hundreds of small draws would take minutes. Numbers are the same.
    quick = {"xla_backend_optimization_level": 1} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(init, out_shardings=shardings, compiler_options=quick), abstract(shapes, shardings)


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    options: OptimizerOptions,
    average: AverageOptions,
    schedules: Mapping[str, optax.Schedule],
    state: TrainState,
    overlap: bool = False,
) -> jax.stages.Wrapped:
    """Returns the jitted update: (state, frozen, batch, key) -> (state, scalars).

    The state's buffers are donated, except on CPUs: the old state must not be used again. If loss or gradients are not
    finite, the update changes the counters only.

    Args:
      task: computes the loss.
      optimizer: from `optimizers.make_optimizer(options)`.
      options: sets the number of accumulation steps.
      average: options of the moving average.
      schedules: by name; all are logged. "learning_rate" multiplies the update.
      state: the abstract state, which sets the shardings.
      overlap: compile with the options of `overlapping`.

    Returns:
      A jitted function. Its scalars are `Scalars`.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: PyTree, key: jax.Array):
        scheduled = {name: schedule(state.step) for name, schedule in schedules.items()}

        def loss(params: PyTree, rows: PyTree, key: jax.Array):
            return task.loss(params, frozen, rows, key, state.step)

        loss_key = keys.stream(key, "loss", state.step)
        grads, scalars = optimizers.accumulated_gradients(loss, state.params, batch, loss_key, options.accumulate_steps)
        statistics = scalars.pop("statistics", None)
        gradient_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(scalars["loss"]) & jnp.isfinite(gradient_norm)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        updates = jax.tree.map(lambda u: -scheduled["learning_rate"] * u, updates)
        params = optax.apply_updates(state.params, updates)
        if statistics is not None:
            params = task.after_update(params, statistics, keys.stream(key, "after_update", state.step))
        ema = None if state.ema is None else optimizers.update_average(state.ema, params, state.step + 1, average)

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            skipped=state.skipped + ~finite,
            skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
        )
        scalars = {
            **scalars,
            **scheduled,
            "gradient_norm": gradient_norm,
            "skipped": new_state.skipped,
            "skipped_in_row": new_state.skipped_in_row,
        }
        return new_state, Scalars.of(scalars)

    shardings = jax.tree.map(lambda x: x.sharding, state)
    mesh = state.step.sharding.mesh
    asked = overlapping(mesh.devices.flat[0]) if overlap else None
    return jax.jit(
        train_step,
        donate_argnums=(0,) if donates(mesh) else (),
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=asked,
    )


def frozen_shardings(task: Task, mesh: Mesh) -> dict[str, PyTree]:
    """Returns the sharding of each frozen parameter of a task; see `Task.split_shapes`."""
    split = getattr(task, "split_shapes", {})
    everywhere = lambda tree: jax.tree.map(lambda _: replicated(mesh), tree)
    return {
        name: shardings_of(split[name], mesh) if name in split else everywhere(tree)
        for name, tree in task.frozen.items()
    }


def donates(mesh: Mesh) -> bool:
    """Returns whether the train step writes the new state over the old one.

    On CPUs it does not, because donation makes the steps of small models up to a third slower there.
    """
    return mesh.devices.flat[0].platform != "cpu"
