"""Opens the source that `DataOptions` names."""

from __future__ import annotations

import dataclasses

from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.data.sources.once import once
from dalle_jax.data.sources.own import AUTO, choose_source
from dalle_jax.data.sources.source import DataOptions, Source
from dalle_jax.data.sources.tar_shards.shards_source import ShardsSource
from dalle_jax.data.sources.tfds import TfdsSource


def open_source(options: DataOptions, split: str) -> Source:
    """Opens the source that the options name, and first prepares its TFDS data set if needed.

    In an `opened_once` block it opens each split once.

    Args:
      options: what to read.
      split: the part to read ("train", "validation", "heldout", "train[:90%]", "val+test", …).

    Returns:
      The source.

    Raises:
      DataError: if it does not exist, or lacks the split or the features.
    """
    if options.source == AUTO:
        options = dataclasses.replace(options, source=choose_source(options.source, options.path))
    condition = options.condition if options.names_classes else "text"
    what = dataclasses.replace(options, augment="none", bpe_dropout=0.0, condition=condition)  # of a training
    return once(("source", repr(what), split), lambda: _open(options, split))


def _open(options: DataOptions, split: str) -> Source:
    if options.source == "folder":
        source = FolderSource(options.path, split, options)
    elif options.source == "tar_shards":
        source = ShardsSource(options, split)
    else:
        source = TfdsSource(options, split)
    source.limits = dataclasses.replace(options.limits, image_size=None)
    return source
