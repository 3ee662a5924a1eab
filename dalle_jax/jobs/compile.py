"""The job of `configs/compile.py`: compiles a training or a sampler for a TPU topology and reports its costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dalle_jax.aot import costs
from dalle_jax.aot.compiler import compile_target
from dalle_jax.aot.target import CompileOptions
from dalle_jax.configuration.options import from_config
from dalle_jax.errors import DoesNotFit
from dalle_jax.storage.files import access, make_workdir, write_json


def run(config: ConfigDict, workdir: str) -> Mapping[str, Any]:
    """Compiles the target, prints the table of its costs and writes them to `compile.json`.

    Args:
      config: see `configs/compile.py`.
      workdir: folder for `compile.json`, created if needed.

    Returns:
      The costs, as from `compile_target`.

    Raises:
      ConfigError: `workdir` is not writable; see also `compile_target`.
      DoesNotFit: the program needs too much memory. If it could be compiled, table and file are written before.
    """
    options = from_config(CompileOptions, {key: config[key] for key in config if key not in ("job", "workdir")}, "")
    folder = _writable(workdir)
    found = compile_target(options)
    print(costs.table(found))
    write_json(folder / "compile.json", found)
    if not found["fits"]:
        raise DoesNotFit(found["remedies"])
    return found


def _writable(workdir: str) -> epath.Path:
    """Creates the folder of the results and tests it, because the compilation may take hours.

    Raises:
      ConfigError: the folder cannot be created or written.
    """
    folder = epath.Path(make_workdir(workdir))
    with access(workdir):
        trial = folder / "compile.json.trial"
        trial.write_text("")
        trial.unlink()
    return folder
