"""Opens the source that `DataOptions` names."""

from __future__ import annotations

from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.data.sources.source import DataOptions, Source
from dalle_jax.data.sources.tfds import TfdsSource


def open_source(options: DataOptions, split: str) -> Source:
    """Opens the source that the options name, and first prepares its TFDS data set if needed.

    Args:
      options: what to read.
      split: the part to read ("train", "validation", "heldout", "train[:90%]", "val+test", …).

    Returns:
      The source.

    Raises:
      DataError: if it does not exist, or lacks the split or the features.
    """
    if options.source == "folder":
        return FolderSource(options.path, split, options)
    return TfdsSource(options, split)
