"""Reads the parameters of a trained prior, with its adapters merged if it was trained with some.

<workdir>/base/    the frozen base of a training with adapters: options.json and params.msgpack
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from dalle_jax.checkpoints import frozen
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.exported import Exported
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.configuration.options import from_config
from dalle_jax.errors import CheckpointError
from dalle_jax.priors import lora
from dalle_jax.priors.lora import LoRAOptions
from dalle_jax.priors.matching import match
from dalle_jax.pytree import PyTree, fingerprint, first_mismatch
from dalle_jax.storage.files import expanded

Run = Checkpoints | Exported
_REMEDY = "Put back the folder base/ of the training, or train again in another --workdir."


def lora_of(config: Mapping[str, Any] | ConfigDict) -> LoRAOptions:
    """Returns the options of the adapters of a configuration. Earlier versions had none."""
    return from_config(LoRAOptions, config.get("lora") or {}, "lora")


def has_base(workdir: epath.PathLike) -> bool:
    """Returns whether a workdir holds the frozen base of adapters."""
    return frozen.exists(expanded(workdir) / "base")


def save_base(workdir: epath.PathLike, params: PyTree, origin: str) -> None:
    """Freezes the base of adapters into a workdir. `origin` names the run that it comes from."""
    frozen.save(expanded(workdir) / "base", {"origin": origin}, params)


def load_base(workdir: epath.PathLike) -> tuple[PyTree, str]:
    """Loads the base of adapters, float32, and the name of the run that it comes from.

    Raises:
      DamagedError: it is missing or damaged.
    """
    options, params = frozen.load(expanded(workdir) / "base", _REMEDY)
    return params, str(options.get("origin", ""))


def restore(
    run: Run,
    workdir: epath.PathLike,
    step: int | str | None = None,
    *,
    layout: Callable[[PyTree], PyTree] | None = None,
    tokenizer_params: PyTree | None = None,
) -> PyTree:
    """Reads the parameters of a prior, see `Checkpoints.restore_params`.

    Args:
      run: the opened workdir or export.
      workdir: its folder.
      step: of the checkpoint.
      layout: maps shapes to shardings, for the whole parameters.
      tokenizer_params: those of its image tokenizer, which are compared with those of the training. None skips this.

    Raises:
      CheckpointError: see `Checkpoints.restore_params`; or the base of adapters is another one.
    """
    options, modules = lora_of(run.config(step)), {"tokenizer": tokenizer_params}
    if not options.rank:
        mark = None if tokenizer_params is None else fingerprint(modules)
        return run.restore_params(step, layout=layout, frozen=mark)
    base, _ = load_base(workdir)
    mark = None if tokenizer_params is None else fingerprint({**modules, "base": base})
    adapters = run.restore_params(step, frozen=mark)
    return place(lora.merge(base, adapters, options), layout)


def place(params: PyTree, layout: Callable[[PyTree], PyTree] | None) -> PyTree:
    """Puts parameters on devices: those of `layout` of their shapes, or as they are."""
    if layout is None:
        return params
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    return jax.tree.map(jax.device_put, params, layout(shapes))


def restore_adapters(run: Exported, folder: str, shapes: PyTree, tokenizer_params: PyTree) -> PyTree:
    """Reads exported adapters and merges them into the prior that they belong to.

    Args:
      run: the export.
      folder: workdir or export of the base.
      shapes: of the parameters of the prior.
      tokenizer_params: those of the base's image tokenizer.

    Returns:
      The parameters of the prior.

    Raises:
      CheckpointError: the base is another one than that of the training, or the adapters do not fit it.
    """
    options, mismatch = lora_of(run.config()), f"{folder} is not the base of the adapters in {run.folder}"
    with open_run(folder) as opened:
        found = match(shapes, jax.device_get(restore(opened, folder, tokenizer_params=tokenizer_params)))
    if lacking := [name for name, array in found.items() if array is None]:
        raise CheckpointError(f"{mismatch}: its parameter {lacking[0]} is missing or has another shape.")
    base = jax.tree.unflatten(jax.tree.structure(shapes), found.values())
    if run.base is None or fingerprint(base) != run.base.get("fingerprint"):
        raise CheckpointError(f"{mismatch}: it has other parameters. Give the base of the training, in float32.")
    adapters = run.restore_params(frozen=fingerprint({"tokenizer": tokenizer_params, "base": base}))
    expected = jax.eval_shape(lambda key: lora.init(key, shapes, options), jax.random.key(0))
    if wrong := first_mismatch(adapters, expected):
        raise CheckpointError(f"{run.folder}: the adapter {wrong[0]} is {wrong[1]}, and its base needs {wrong[2]}.")
    return lora.merge(base, adapters, options)
