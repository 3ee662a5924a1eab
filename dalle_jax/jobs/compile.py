"""The job of `configs/compile.py`: compiles a training or a sampler for a TPU topology and reports its costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dalle_jax.aot import costs
from dalle_jax.aot.compiler import compile_target
from dalle_jax.aot.target import CompileOptions, load_target
from dalle_jax.configuration.options import from_config
from dalle_jax.errors import DoesNotFit
from dalle_jax.storage.files import check_writable, expanded, write_json


def run(config: ConfigDict, workdir: str) -> Mapping[str, Any]:
    """Compiles the target, prints the table of its costs and writes them to `compile.json`.

    Args:
      config: see `configs/compile.py`.
      workdir: folder for `compile.json`, created if needed.

    Returns:
      The costs, as from `compile_target`.

    Raises:
      ConfigError: see `check` and `compile_target`.
      DoesNotFit: the program needs too much memory. If it could be compiled, table and file are written before.
    """
    options = check(config, workdir)
    folder = expanded(workdir)
    found = compile_target(options)
    print(costs.table(found))
    write_json(folder / "compile.json", found)
    if not found["fits"]:
        raise DoesNotFit(found["remedies"])
    return found


def check(config: ConfigDict, workdir: str) -> CompileOptions:
    """Rejects whatever can be rejected before the compilation, which may take hours, and creates `workdir`.

    Raises:
      ConfigError: an invalid value, no such target, or a `workdir` that cannot be written.
    """
    options = from_config(CompileOptions, {key: config[key] for key in config if key not in ("job", "workdir")}, "")
    load_target(options.target, options.overrides)
    check_writable(workdir)
    return options
