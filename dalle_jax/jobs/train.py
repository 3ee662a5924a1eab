"""The train job: trains an image tokenizer first if the prior needs one, then what the configuration describes.

`configs/prior.py` holds the complete configuration of its tokenizer, so that one command works on a fresh machine.
"""

from __future__ import annotations

import copy
import time

from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.distributed.turns import first_host_first, first_host_says
from dalle_jax.tasks.registry import check_config
from dalle_jax.training import budget
from dalle_jax.training.loop import train
from dalle_jax.training.step import TrainState
from dalle_jax.training.validation import validate


def run(config: ConfigDict, workdir: str) -> TrainState:
    """Trains the task of `config`, after its image tokenizer if it needs one that does not exist.

    A section `tokenizer` of `config` is a complete training configuration. The frozen tokenizer then comes from the
    first of these that exists:
      1. `workdir` itself.
      2. `config.tokenizer_from`: a workdir, or a folder that an importer of `dalle_jax.pretrained` wrote.
      3. `config.tokenizer.workdir`, after training it there. It uses the same images if its `data.path` is not set.
    `start_from` names the workdir of another prior. Tokenizer and text model then come from there by default.

    Args:
      config: a training configuration.
      workdir: directory of the run.

    Returns:
      The final state.

    Raises:
      UserError: an invalid configuration, before any training begins, or an error of `train`.
    """
    began = time.perf_counter()
    # Now, and not after days of training its tokenizer.
    validate(config)
    check_config(config)
    if "tokenizer" in config and config.tokenizer.data.source == config.data.source:
        config = copy.deepcopy(config)  # keeps the references to `steps`, which `minutes` sets
        config.tokenizer.data.path = config.tokenizer.data.path or config.data.path
    if config.get("start_from"):
        config = copy.deepcopy(config)  # keeps the references to `steps`, which `minutes` sets
        config.tokenizer_from = config.tokenizer_from or config.start_from
        config.text.path = config.text.path or str(workdirs.text_model_path(config.start_from))
    if "tokenizer" in config and not first_host_says("has a tokenizer", workdirs.has_tokenizer(workdir)):
        source = config.tokenizer_from or config.tokenizer.workdir
        fixed = None if config.tokenizer_from else budget.fixed_steps(config.tokenizer, source)
        training = config.tokenizer if fixed is None else budget.with_steps(config.tokenizer, fixed)
        planning = fixed is None and config.tokenizer.get("minutes") is not None
        trained = config.tokenizer_from or not planning and workdirs.is_complete(source, training)
        if not first_host_says("tokenizer is trained", bool(trained)):
            logging.info("%s needs an image tokenizer, and %s holds none yet: training it first.", workdir, source)
            run(config.tokenizer, source)
        tokenizer, params = workdirs.load_tokenizer(source)
        with first_host_first("the frozen image tokenizer"):
            if not workdirs.has_tokenizer(workdir):
                workdirs.save_tokenizer(workdir, tokenizer, params)
    return train(config, workdir, began=began)
