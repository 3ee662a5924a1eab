"""The job of `configs/compile.py`: compiles a training or a sampler for a TPU topology and reports what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dalle_jax.aot import costs
from dalle_jax.aot.target import CompileOptions, compile_target
from dalle_jax.configuration.options import from_config
from dalle_jax.errors import DoesNotFit
from dalle_jax.storage.files import access, make_workdir, write_json


def run(config: ConfigDict, workdir: str) -> Mapping[str, Any]:
    """The job of `configs/compile.py`: prints a table, and writes `compile.json` into `workdir`.

    Raises:
      ConfigError: a workdir that cannot be written; and see `compile_target`.
      DoesNotFit: after the table and the file, where there is a program to tell of.
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
    """The folder for the results, made and tried before the minutes or hours that they take.

    Raises:
      ConfigError: it cannot be made, or nothing can be written there.
    """
    folder = epath.Path(make_workdir(workdir))
    with access(workdir):
        trial = folder / "compile.json.trial"
        trial.write_text("")
        trial.unlink()
    return folder
