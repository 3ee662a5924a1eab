"""Compiles a training's step, or a prior's sampler, for a TPU topology: does it fit, and what does it cost?

    python -m dalle_jax.main --config=configs/compile.py --config.target=configs/prior.py:paper \
        --config.topology=v5p:8x8x8 --config.overrides="mesh.data=8,batch_size=2048"

No TPU is needed: the TPU compiler runs anywhere. What is compiled is the function that `train.py` runs, from shapes
alone: no data, no weights.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.metadata
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from dalle_jax import compilation_cache
from dalle_jax.aot import costs, kernels, model_flops, remedies, topologies
from dalle_jax.aot.program import Program
from dalle_jax.configuration import config_files
from dalle_jax.configuration.options import check, from_config
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import check_batch
from dalle_jax.distributed.sharding import abstract, batch_sharding, batch_shards, on_mesh, replicated
from dalle_jax.errors import ConfigError, DoesNotFit
from dalle_jax.optim import optimizers, schedules
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.pytree import PyTree
from dalle_jax.tasks import registry
from dalle_jax.tasks.task import Task
from dalle_jax.training.step import TrainState, make_init, make_train_step

WHAT = ("train", "sample")


EFFORTS = {"full": {}, "low": {"exec_time_optimization_effort": -1.0}}


@dataclasses.dataclass(frozen=True)
class CompileOptions:
    """What to compile for what.

    Attributes:
      target: a training's config file, with its variant: "configs/prior.py:paper".
      topology: of TPUs, see `tpu.topologies`.
      overrides: of the target's keys: "mesh.fsdp=64,model.trunk.remat=dots"; values without commas.
      what: "train", its update, or "sample", a prior drawing `rows` pictures, each for a caption of its own.
      rows: of "sample".
      effort: "full", as training compiles, or "low", a fifth of the time: exchanges do not overlap then, and it
        needs up to an eighth less memory than the full program (measured).
    """

    target: str
    topology: str
    overrides: str = ""
    what: str = "train"
    rows: int = 64
    effort: str = "full"

    def __post_init__(self):
        check(self, "", positive=["rows"], choices={"what": WHAT, "effort": EFFORTS})


def load_target(target: str, overrides: str = "") -> ConfigDict:
    """The training configuration of a file and variant, with some of its keys changed.

    Args:
      target, overrides: see `CompileOptions`.

    Raises:
      ConfigError: no such file, variant or key, a value of another type, or a config that trains nothing.
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
            pass  # a word
        try:
            config.update_from_flattened_dict({name: value})
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"config.overrides: {name}={value!r} does not fit {target}: {error}") from None
    return config


@dataclasses.dataclass(frozen=True)
class Subject:
    """A training as shapes.

    Attributes:
      config: its configuration.
      mesh: of the topology's devices.
      task: see `abstract`.
      state, frozen, batch: `ShapeDtypeStruct`s with shardings, arguments of the update.
      options, average: of the update.
    """

    config: ConfigDict
    mesh: Mesh
    task: Task
    state: TrainState
    frozen: PyTree
    batch: PyTree
    options: OptimizerOptions
    average: AverageOptions


def make_subject(config: ConfigDict, devices: Any) -> Subject:
    """Everything about a training that its program depends on.

    Raises:
      UserError: a configuration or mesh that cannot be.
    """
    mesh = make_mesh(**config.mesh, devices=devices)
    options = from_config(OptimizerOptions, config.optimizer, "optimizer")
    average = from_config(AverageOptions, config.ema, "ema")
    check_batch(mesh, config.batch_size, options.accumulate_steps)
    task, batch = registry.abstract(config)
    _, state = make_init(task, optimizers.make_optimizer(options), average, mesh, config.seed)
    frozen = _on(task.frozen, replicated(mesh))
    return Subject(config, mesh, task, state, frozen, _on(batch, batch_sharding(mesh)), options, average)


def _on(tree: PyTree, sharding: NamedSharding) -> PyTree:
    return abstract(tree, jax.tree.map(lambda _: sharding, tree))


def lower_train_step(subject: Subject) -> tuple[jax.stages.Lowered, dict[str, PyTree]]:
    """The update of `train.py`, lowered from shapes; and its arguments, by what they are."""
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
    key = _on(jax.eval_shape(jax.random.key, 0), replicated(s.mesh))
    with on_mesh(s.mesh):
        lowered = step.lower(s.state, s.frozen, s.batch, key)
    state = {"parameters": s.state.params, "average": s.state.ema, "optimizer": s.state.opt_state}
    return lowered, {**state, "frozen": s.frozen, "batch": s.batch}


def lower_sampler(subject: Subject, rows: int) -> tuple[jax.stages.Lowered, dict[str, PyTree]]:
    """A prior drawing the tokens of `rows` pictures, as `text_to_image.py` has it do, rows split over the mesh; and
    its arguments, by what they are.

    Raises:
      ConfigError: a task that draws nothing, or rows that cannot be split.
    """
    prior = getattr(subject.task, "prior", None)
    if prior is None:
        raise ConfigError(
            f"config.what='sample': only a prior draws pictures, and the task is {subject.config.task!r}."
        )
    shards = batch_shards(subject.mesh)
    if rows % shards:
        raise ConfigError(
            f"config.rows={rows} cannot be split over {shards} devices (mesh {dict(subject.mesh.shape)}): give a "
            f"multiple of {shards}, or another mesh in config.overrides."
        )
    by_row = batch_sharding(subject.mesh)
    text = _on(jax.ShapeDtypeStruct((rows, prior.layout.text_length), jnp.int32), by_row)
    keys = _on(jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)), by_row)
    with on_mesh(subject.mesh):
        lowered = jax.jit(prior.sample).lower(subject.state.eval_params, text, keys)
    return lowered, {"parameters": subject.state.eval_params, "captions": text}


def compile_target(options: CompileOptions) -> dict[str, Any]:
    """Compiles, and measures what came out.

    Returns:
      See `tpu.figures`; and "remedies", where the compiler made a program that does not fit: what would help, else "".

    Raises:
      ConfigError: target, topology or overrides that cannot be.
      DoesNotFit: the compiler refuses a program that needs more memory than a chip has; says what would help.
    """
    config = load_target(options.target, options.overrides)
    devices = topologies.devices(options.topology)
    subject = make_subject(config, devices)
    logging.info("%s on %s: lowering and compiling", options.target, options.topology)
    began = time.perf_counter()
    lower = lower_train_step if options.what == "train" else functools.partial(lower_sampler, rows=options.rows)
    lowered, arguments = lower(subject)
    try:
        with compilation_cache.turned_off():
            compiled = lowered.compile(EFFORTS[options.effort])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = remedies.needed_and_available(str(error))
        raise DoesNotFit(remedies.explain(options, subject, arguments, memory, str(error))) from None
    seconds, program = time.perf_counter() - began, Program(compiled.as_text())
    rows = config.batch_size if options.what == "train" else options.rows
    if options.what == "train":
        wanted = model_flops.training(subject.task, subject.batch)
    else:
        wanted = model_flops.sampling(subject.task.prior, rows)
    found = costs.figures(
        subject.mesh,
        arguments,
        compiled,
        program,
        wanted,
        rows,
        kernels.of_subject(program.silent_kernels, subject, rows, sampling=options.what == "sample"),
    )
    memory = (found["bytes"]["total"], found["bytes"]["memory"])
    return {
        **dataclasses.asdict(options),
        **found,
        "remedies": "" if found["fits"] else remedies.explain(options, subject, arguments, memory),
        "compile_seconds": seconds,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }
