"""The frozen base of a training of adapters (LoRA): checked before the training, and copied into its workdir."""

from __future__ import annotations

import flax.linen as nn
import jax
from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import ConfigError
from dalle_jax.priors import trained
from dalle_jax.priors.matching import match
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree
from dalle_jax.storage import hub


def check_adapters(config: ConfigDict) -> None:
    """Checks `config.lora`.

    Raises:
      ConfigError: adapters without `config.start_from`, or an invalid value.
    """
    options = trained.lora_of(config)
    if options.rank and not config.get("start_from"):
        raise ConfigError(
            f"config.lora.rank is {options.rank}, and config.start_from is not set: adapters are trained for a prior "
            "that exists. Give its workdir or export, --config.start_from=DIR, or --config.lora.rank=0."
        )


def base_of(config: ConfigDict, workdir: str, prior: TokenPrior) -> PyTree:
    """Returns the base of the adapters of a run, after copying it from `config.start_from` if it does not exist yet.

    Args:
      config: a configuration with a `lora.rank` above 0.
      workdir: of the run. It holds its image tokenizer and its text model.
      prior: the prior of the configuration.

    Returns:
      Float32 parameters of the prior.

    Raises:
      ConfigError: the prior `start_from` has other sizes, or another text model.
      CheckpointError: it cannot be read.
    """
    with first_host_first(f"the base of the adapters in {workdir}"):
        if not trained.has_base(workdir):
            trained.save_base(workdir, _fitted(config.start_from, workdir, prior), hub.name_of(config.start_from))
    base, origin = trained.load_base(workdir)
    logging.info("The base of the adapters is %s, frozen in %s/base", origin, workdir)
    return base


def _fitted(start_from: str, workdir: str, prior: TokenPrior) -> PyTree:
    """Returns the parameters of a run in the layout of the prior."""
    given, own = (workdirs.text_model_path(folder) for folder in (start_from, workdir))
    if given.exists() != own.exists() or own.exists() and given.read_bytes() != own.read_bytes():
        raise ConfigError(
            f"config.text.path is another text model than that of config.start_from={start_from!r}. Adapters keep the "
            "embeddings of their base: leave out config.text.path, or give --config.lora.rank=0."
        )
    shapes = nn.meta.unbox(jax.eval_shape(prior.init, jax.random.key(0)))
    with open_run(start_from) as run:
        found = match(shapes, jax.device_get(trained.restore(run, start_from)))
    if lacking := [name for name, array in found.items() if array is None]:
        raise ConfigError(
            f"config.start_from={start_from!r}: {len(lacking)} of {len(found)} parameters of this model are missing "
            f"there or have other shapes, such as {lacking[0]}. Adapters need a model of the same sizes: "
            "configs/finetune.py takes them from there."
        )
    return jax.tree.unflatten(jax.tree.structure(shapes), found.values())
