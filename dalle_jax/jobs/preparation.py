"""Completes the configuration of a chain of trainings, and rejects contradictions in it, before anything is opened."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.compatibility import flatten, to_json
from dalle_jax.checkpoints.downloaded import local
from dalle_jax.configuration.sections import EMOJI, SHAPES, section
from dalle_jax.data import token_store
from dalle_jax.data.sources.own import FOLDER, TAR_SHARDS, choose_source
from dalle_jax.errors import ConfigError
from dalle_jax.priors.autoregressive import AutoregressiveOptions
from dalle_jax.priors.registry import CONDITIONS, condition_of
from dalle_jax.tasks import beit
from dalle_jax.tasks.prior import EACH_BATCH, ONCE

# Sources that draw their own images, with the arguments of their builder that variants set.
_DRAWN = {row["source"]: row["builder_kwargs"] for row in (SHAPES, EMOJI)}
_FILES = {
    "dvae": "dvae",
    "vq": "dvae",
    "vqgan": "vqgan",
    "beit": "beit",
    "clip": "clip",
    "autoregressive": "prior",
    "maskgit": "maskgit",
}  # → config file

NEW = "new"  # as `config.text.path`: train a text model although `start_from` has one
_USUAL_PEAK = 4.5e-4  # of configs/finetune.py, for a prior whose step size is unknown


def prepare(config: ConfigDict) -> ConfigDict:
    """Returns a copy of a training configuration with the sources of its data chosen.

    `data.source` "auto" becomes the kind of files in `data.path`. Arguments of another source's builder are dropped.
    Values of the run that `start_from` names are filled in.

    Args:
      config: a training configuration, perhaps with that of its tokenizer.

    Raises:
      ConfigError: the data sections contradict each other, their path or their source.
    """
    config = copy.deepcopy(config)  # keeps references, which `copy_and_resolve_references` would not
    for key in ("start_from", "tokenizer_from", "clip_from", "low_from"):
        if config.get(key):
            config[key] = local(config[key])
    _drop_tokenizer(config)
    _follow_tokens(config)
    _follow_start(config)
    if "prior" in config:
        condition = condition_of(config)
        for other in CONDITIONS.values():
            unused = [key for key in other.own_keys if config.get(key) and key not in condition.own_keys]
            if unused:
                raise ConfigError(
                    f"config.{unused[0]} is {config[unused[0]]!r}, and config.data.condition is {condition.name!r}, "
                    f"which does not use it. Leave it out, or set --config.data.condition={other.name}."
                )
        condition.complete(config)
    _choose_source(config, config)
    if "tokenizer" in config and not config.tokenizer_from:
        _choose_source(config.tokenizer, config, "tokenizer.")
        # BEiT's tokenizer reads smaller images, so that one token stands for one patch.
        for key in ("source",) if config.task == "beit" else ("source", "image_size"):
            inner, outer = config.tokenizer.data[key], config.data[key]
            if inner != outer:
                name = f"config.tokenizer.data.{key}"
                raise ConfigError(
                    f"{name} is {inner!r}, but config.data.{key} is {outer!r}. A tokenizer that is trained for a prior "
                    f"follows it: leave out {name}. Or train another tokenizer with configs/dvae.py and give "
                    "--config.tokenizer_from=DIR."
                )
    return config


def file_of(config: ConfigDict) -> str:
    """Returns the name of the config file of a training without folder and ending: "prior"."""
    return _FILES.get(config.get("prior", config.task), "prior")


def config_file(config: ConfigDict) -> str:
    """Returns the path of the config file of a training: "configs/prior.py"."""
    return f"configs/{file_of(config)}.py"


def _choose_source(config: ConfigDict, outer: ConfigDict, prefix: str = "") -> None:
    data = config.data
    if data.source in _DRAWN and data.path:
        raise ConfigError(
            f"config.{prefix}data.path is {data.path!r}, but {data.source} draws its own images. For yours type "
            f"--config={config_file(outer)}:small --config.data.path={data.path}"
        )
    data.source = choose_source(data.source, data.path, f"{prefix}data")
    arguments = data.builder_kwargs.to_dict()
    foreign = any(name != data.source and arguments == kwargs for name, kwargs in _DRAWN.items())
    if arguments and (foreign or data.source in (FOLDER, TAR_SHARDS)):
        with config.unlocked():
            del data["builder_kwargs"]
            data.builder_kwargs = ConfigDict()


def _drop_tokenizer(config: ConfigDict) -> None:
    """Removes the tokenizer of a BEiT that predicts pixels or labels, so that none is trained for it."""
    if config.task == "beit" and not beit.needs_tokenizer(config):
        with config.unlocked():
            for key in {"tokenizer", "tokenizer_from", "tokenizer_step"} & set(config):
                del config[key]


def _follow_tokens(config: ConfigDict) -> None:
    """Takes the image tokenizer from the folder of tokens that `data_tokens` names, unless it is set."""
    given = config.get("data_tokens")
    if given not in (None, "", ONCE, EACH_BATCH) and not config.tokenizer_from:
        if token_store.exists(given) and workdirs.has_tokenizer(given):
            config.tokenizer_from = given


def _follow_start(config: ConfigDict) -> None:
    """Takes tokenizer, text model and text length from the run that `start_from` names, unless they are set.

    With `follow_start`, everything else that describes the model comes from there, too.
    """
    start, own_text = config.get("start_from"), "text" in config and config.text.path == NEW
    if own_text:
        config.text.path = None
    if not start:
        if config.get("follow_start"):
            raise ConfigError(
                "config.start_from is not set: fine-tuning needs the workdir or the export of a prior, such as "
                "--config.start_from=runs/prior-shapes."
            )
        return
    stored = workdirs.read_config(start) if workdirs.has_config(start) else None
    if config.get("follow_start") and stored is not None:
        config.data.condition = condition_of(stored).name
    fits = stored is None or "prior" not in config or issubclass(condition_of(stored), condition_of(config))
    if "tokenizer" in config:
        config.tokenizer_from = config.tokenizer_from or start
    if "text" in config:
        if not own_text and fits:
            config.text.path = config.text.path or str(workdirs.text_model_path(start))
        if config.text.length is None and stored is not None and "text" in stored:
            config.text.length = stored["text"]["length"]
    if config.get("follow_start") and stored is not None and stored["task"] == "prior":
        _follow_model(config, stored)


def _follow_model(config: ConfigDict, stored: Mapping[str, Any]) -> None:
    """Replaces image size, prior and model by those of another run, except the model's keys that are set.

    The largest step size becomes the share `follow_start` of that of the other run, unless it is set.
    """
    usual = flatten(to_json(section(AutoregressiveOptions)))
    given = {key: value for key, value in flatten(to_json(config.model)).items() if value != usual.get(key)}
    with config.unlocked():
        del config["model"], config["prior"]
        config.model, config.prior = ConfigDict(stored["model"]), stored["prior"]
        config.model.update_from_flattened_dict(given)
    config.data.image_size = stored["data"]["image_size"]
    config.data.bpe_dropout = float(stored["data"].get("bpe_dropout", 0.0))
    rate, share = config.schedules.learning_rate, config.follow_start
    earlier = stored.get("schedules", {}).get("learning_rate", {})
    peak = earlier.get("peak", earlier.get("value"))
    if peak is not None and rate.get("peak") == _USUAL_PEAK * share:
        rate.peak = float(peak) * share
