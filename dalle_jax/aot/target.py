"""The target of a compilation: a training described by shapes, and its lowered functions."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence

import jax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from dalle_jax.configuration import config_files
from dalle_jax.configuration.options import check
from dalle_jax.configuration.size_rules import with_largest
from dalle_jax.data.sources import own
from dalle_jax.distributed.sharding import abstract, batch_sharding, batch_shards, on_mesh, replicated
from dalle_jax.errors import ConfigError
from dalle_jax.optim import optimizers, schedules
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.pytree import PyTree
from dalle_jax.tasks import registry
from dalle_jax.tasks.task import Task
from dalle_jax.training.step import TrainState, frozen_shardings, make_init, make_train_step
from dalle_jax.training.validation import check_values, mesh_and_options

WHAT = ("train", "sample")
EFFORTS = {"full": {}, "low": {"exec_time_optimization_effort": -1.0}}  # options of the compiler


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """Options of a compilation: the target and the topology.

    Attributes:
      target: config file of a training with its variant, such as "configs/prior.py:paper".
      topology: name of a TPU topology, see `topologies`.
      overrides: keys of the target, such as "mesh.fsdp=64,model.trunk.remat=dots". Values must not contain commas.
      what: "train" compiles the update step, "sample" the sampler of a prior.
      rows: number of images per call of the sampler, each with its own caption.
      effort: "full" compiles as a training does. "low" takes a fifth of the time, does not overlap exchanges, and
        yields a program that needs up to an eighth less memory (measured).
    """

    target: str
    topology: str
    overrides: str = ""
    what: str = "train"
    rows: int = 64
    effort: str = "full"

    def __post_init__(self):
        check(self, "", positive=["rows"], most={"rows": 2**20}, choices={"what": WHAT, "effort": EFFORTS})


def load_target(target: str, overrides: str = "") -> ConfigDict:
    """Loads a training configuration and applies overrides.

    Args:
      target, overrides: see `CompileOptions`.

    Returns:
      The locked configuration.

    Raises:
      ConfigError: the file, variant or key does not exist, a value has the wrong type, or the config is no training.
    """
    config = config_files.load(target, "config.target")
    if config.get("job") != "train":
        raise ConfigError(
            f"config.target={target!r} is a config of the job {config.get('job')!r}; expected a training."
        )
    config.lock()
    for change in filter(None, (part.strip() for part in overrides.split(","))):
        name, sign, value = change.partition("=")
        if not sign:
            raise ConfigError(f"config.overrides has {change!r}; expected key=value, separated by commas.")
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pass  # a string
        try:
            config.update_from_flattened_dict({name: value})
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"config.overrides: {name}={value!r} does not fit {target}: {error}") from None
    return config


@dataclasses.dataclass(frozen=True)
class Subject:
    """A training described by shapes.

    Attributes:
      config: its configuration.
      mesh: mesh of the devices of the topology.
      task: its task, from `registry.abstract`.
      state, frozen, batch: arguments of the update step as `ShapeDtypeStruct`s with shardings.
      options: options of the optimizer.
      average: options of the EMA.
    """

    config: ConfigDict
    mesh: Mesh
    task: Task
    state: TrainState
    frozen: PyTree
    batch: PyTree
    options: OptimizerOptions
    average: AverageOptions


def make_subject(config: ConfigDict, devices: Sequence[jax.Device]) -> Subject:
    """Collects everything that the program of a training depends on.

    Args:
      config: configuration of the training. Sizes that follow a data set have their largest values.
      devices: devices to compile for, as from `topologies.devices`.

    Raises:
      UserError: the configuration or the mesh is invalid.
    """
    config = with_largest(config)
    if config.data.path is None and config.data.source in (own.AUTO, own.FOLDER, own.TAR_SHARDS):
        config.data.path = "no data is read"  # so that the other values can be checked
    check_values(config)
    registry.check_config(config)
    mesh, options, average = mesh_and_options(config, devices)
    task, batch = registry.abstract(config)
    _, state = make_init(task, optimizers.make_optimizer(options), average, mesh, config.seed)
    frozen = abstract(task.frozen, frozen_shardings(task, mesh))
    batch = _with_sharding(batch, batch_sharding(mesh))
    return Subject(config, mesh, task, state, frozen, batch, options, average)


def _with_sharding(tree: PyTree, sharding: NamedSharding) -> PyTree:
    return abstract(tree, jax.tree.map(lambda _: sharding, tree))


def lower_train_step(subject: Subject) -> tuple[jax.stages.Lowered, dict[str, PyTree]]:
    """Lowers the update step of a training.

    Returns:
      The lowered function, and its arguments by name.
    """
    s = subject
    rate = schedules.make(s.config.schedules.learning_rate, "learning_rate")
    step = make_train_step(
        s.task,
        optimizers.make_optimizer(s.options),
        s.options,
        s.average,
        {**s.task.schedules, "learning_rate": rate},
        s.state,
        overlap=s.config.overlap_exchanges,
    )
    key = _with_sharding(jax.eval_shape(jax.random.key, 0), replicated(s.mesh))
    with on_mesh(s.mesh):
        lowered = step.lower(s.state, s.frozen, s.batch, key)
    state = {"parameters": s.state.params, "average": s.state.ema, "optimizer": s.state.opt_state}
    return lowered, {**state, "frozen": s.frozen, "batch": s.batch}


def lower_sampler(subject: Subject, rows: int) -> tuple[jax.stages.Lowered, dict[str, PyTree]]:
    """Lowers the sampler of a prior, as `TextToImage` runs it, with rows split over the mesh.

    Args:
      subject: the training of a prior.
      rows: number of images.

    Returns:
      The lowered function, and its arguments by name.

    Raises:
      ConfigError: the task has no sampler, or the rows cannot be split.
    """
    prior = getattr(subject.task, "prior", None)
    if prior is None:
        raise ConfigError(f"config.what='sample': only a prior can sample, but the task is {subject.config.task!r}.")
    shards = batch_shards(subject.mesh)
    if rows % shards:
        raise ConfigError(
            f"config.rows={rows} cannot be split over {shards} devices (mesh {dict(subject.mesh.shape)}). Give a "
            f"multiple of {shards}, or another mesh in config.overrides."
        )
    by_row = batch_sharding(subject.mesh)
    empty = prior.layout.condition.empty()
    given = _with_sharding(jax.ShapeDtypeStruct((rows, *empty.shape), empty.dtype), by_row)
    keys = _with_sharding(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)), by_row)
    with on_mesh(subject.mesh):
        lowered = jax.jit(prior.sample).lower(subject.state.eval_params, given, keys)
    return lowered, {"parameters": subject.state.eval_params, "captions": given}
