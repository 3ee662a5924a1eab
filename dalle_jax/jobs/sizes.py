"""Fixes the sizes of a chain of trainings that follow its data set, once, at the beginning of a run.

`steps`, `text.vocab_size` and `text.length` are None in the variants for your own images. They are read from the
`config.json` of a run that exists already, so that a resumed run repeats an uninterrupted one whatever its data set
looks like by then. Otherwise the data set is measured and `configuration/size_rules.py` decides. With `minutes`,
`steps` is planned later (training/budget.py).
"""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints.compatibility import flatten
from dalle_jax.configuration.options import from_config
from dalle_jax.configuration.size_rules import open_sizes, rules_of
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import CaptionModel, normalize
from dalle_jax.distributed.turns import first_host_says, is_first
from dalle_jax.jobs import earlier
from dalle_jax.priors.registry import condition_of

_SAMPLE = 2000  # examples whose captions are read
_ALPHABET = 256  # with more letters, the rarest 0.05% of the text need no id, see `TextModel.train`
_COVERED = 0.9995
_PERCENTILE = 99


@dataclasses.dataclass(frozen=True)
class Measures:
    """The measures of a training split that sizes depend on.

    Attributes:
      examples: number of examples.
      captions: number of captions, estimated from a sample of a large split.
      sample: captions in normal form.
    """

    examples: int
    captions: int
    sample: tuple[str, ...]


def measure(options: DataOptions) -> Measures:
    """Measures the training split of a data set. Reads the captions of at most 2,000 examples, evenly spread."""
    source = open_source(options, options.train_split)
    count = len(source)
    chosen = np.unique(np.linspace(0, count - 1, min(count, _SAMPLE), dtype=np.int64))
    sample = [caption for index in chosen for caption in source.captions_of(int(index))]
    captions = round(len(sample) * count / max(len(chosen), 1))
    return Measures(count, captions, tuple(filter(None, map(normalize, sample))))


def settle(config: ConfigDict, workdir: str) -> ConfigDict:
    """Returns a copy of a training configuration, and of its tokenizer's, in which every size is fixed.

    Sizes that the command line sets stay. The others come from the `config.json` of `workdir` or of the tokenizer's
    workdir if it describes a run on the same data, or from the data set.

    Args:
      config: a training configuration as from `preparation.prepare`.
      workdir: directory of the run.

    Raises:
      ConfigError: the text model of `text.path` cannot be used.
      DataError: the data set cannot be opened.
    """
    config = copy.deepcopy(config)  # keeps references, so that schedules follow
    parts = {"": config}
    if "tokenizer" in config and not config.tokenizer_from:
        parts = {"tokenizer.": config.tokenizer, "": config}
    found = first_host_says("sizes", _found(parts, workdir) if is_first() else None)
    for prefix, part in parts.items():
        part.update_from_flattened_dict(found[prefix])
    return config


def _found(parts: Mapping[str, ConfigDict], workdir: str) -> dict[str, dict[str, int]]:
    """Returns the open sizes of each training of a chain, by the prefix of its keys in the last one."""
    found, last = {}, _stored(workdir, parts[""])
    for prefix, part in parts.items():
        own = _stored(part.workdir, part) if prefix else {}
        stored = {key: own.get(key) or last.get(prefix + key) for key in open_sizes(part)}
        found[prefix] = {key: value for key, value in stored.items() if value is not None}
        planned = {"steps"} if part.get("minutes") is not None else set()  # by training/budget.py
        if missing := [key for key in stored if key not in found[prefix] and key not in planned]:
            found[prefix] |= _measured(part, missing)
    return found


def _stored(workdir: str, config: ConfigDict) -> Mapping[str, Any]:
    """Returns the flattened configuration of a run in `workdir` on the same data; {} if there is none."""
    stored = earlier.read(workdir)
    if stored is None or earlier.data_differences(stored, config):
        return {}
    return flatten(stored)


def _measured(config: ConfigDict, keys: list[str]) -> dict[str, int]:
    """Decides sizes of one training from its data set, and logs them in one line."""
    rules, options = rules_of(config), from_config(DataOptions, config.data, "data")
    found = measure(options)
    sizes = {}
    if "steps" in keys:
        sizes["steps"] = rules.steps(found.examples, config.batch_size)
    if "text.vocab_size" in keys:
        if config.text.path:
            sizes["text.vocab_size"] = condition_of(config).read(config.text.path).vocab_size
        else:
            words = len({word for caption in found.sample for word in caption.split()})
            sizes["text.vocab_size"] = rules.vocab_size(found.captions, words, _letters(found.sample))
    if "text.length" in keys:
        vocab_size = sizes.get("text.vocab_size", config.text.vocab_size)
        kind, path = condition_of(config), config.text.path
        model = kind.read(path) if path else kind.train(found.sample, vocab_size)
        dropout = options.bpe_dropout if model.takes_dropout else 0.0
        sizes["text.length"] = rules.text_length(_tokens(model, found.sample, dropout))
    logging.info(
        "%s, from %s examples with %s captions in %s: %s (set a key to choose another value)",
        config.task, f"{found.examples:,}", f"{found.captions:,}", options.path or options.source,
        ", ".join(f"{key}={value}" for key, value in sizes.items()),
    )  # fmt: skip
    return sizes


def _letters(captions: tuple[str, ...]) -> int:
    """Returns the number of different letters that the text model needs an id for."""
    counts = collections.Counter("".join(captions))
    del counts[" "]
    if len(counts) < _ALPHABET:
        return len(counts)
    covered = np.cumsum(sorted(counts.values(), reverse=True)) / counts.total()
    return int(np.searchsorted(covered, _COVERED)) + 1


def _tokens(model: CaptionModel, captions: tuple[str, ...], dropout: float) -> int:
    """Returns a number of tokens that 99% of the captions do not exceed, with BPE dropout as in training."""
    most = max(map(len, captions)) + len(captions)
    lengths = [
        len(model.encode(caption, max_length=most, dropout=dropout, seed=place)[0])
        for place, caption in enumerate(captions)
    ]
    return int(np.ceil(np.percentile(lengths, _PERCENTILE)))
