"""Compiles a training step or a sampler for a TPU topology and measures the program: does it fit, what does it cost?

    python -m dalle_jax.main --config=configs/compile.py --config.target=configs/prior.py:paper \
        --config.topology=v5p:8x8x8 --config.overrides="mesh.data=8,batch_size=2048"

It needs no TPU, because the TPU compiler runs on any machine, and no data or weights, because shapes are enough. It
compiles the very function that a training runs.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from typing import Any

import jax
from absl import logging

from dalle_jax import compilation_cache
from dalle_jax.aot import costs, kernels, model_flops, remedies, topologies
from dalle_jax.aot.program import Program
from dalle_jax.aot.target import EFFORTS, CompileOptions, load_target, lower_sampler, lower_train_step, make_subject
from dalle_jax.errors import DoesNotFit


def compile_target(options: CompileOptions) -> dict[str, Any]:
    """Compiles a target and measures the program.

    Args:
      options: what to compile, and for which topology.

    Returns:
      JSON values: the fields of `options`, `costs.costs_of`, "compile_seconds", "versions", and "remedies", a text
      that says what would help, or "" if the program fits.

    Raises:
      ConfigError: target, topology or overrides are invalid.
      DoesNotFit: the compiler rejects a program that needs more memory than a chip has. The message says what would
        help.
    """
    config = load_target(options.target, options.overrides)
    subject = make_subject(config, topologies.devices(options.topology))
    logging.info("%s on %s: lowering and compiling", options.target, options.topology)
    began = time.perf_counter()
    if options.what == "train":
        rows, flops = config.batch_size, model_flops.training(subject.task, subject.batch)
        lowered, arguments = lower_train_step(subject)
    else:
        rows = options.rows
        lowered, arguments = lower_sampler(subject, rows)
        flops = model_flops.sampling(subject.task.prior, rows)
    try:
        with compilation_cache.turned_off():
            compiled = lowered.compile(EFFORTS[options.effort])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = remedies.needed_and_available(str(error))
        raise DoesNotFit(remedies.explain(options, subject, arguments, memory, str(error))) from None
    seconds, program = time.perf_counter() - began, Program(compiled.as_text())
    kernel_seconds = kernels.of_subject(program.silent_kernels, subject, rows, sampling=options.what == "sample")
    found = costs.costs_of(subject.mesh, arguments, compiled, program, flops, rows, kernel_seconds)
    memory = (found["bytes"]["total"], found["bytes"]["memory"])
    return {
        **dataclasses.asdict(options),
        **found,
        "remedies": "" if found["fits"] else remedies.explain(options, subject, arguments, memory),
        "compile_seconds": seconds,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }
