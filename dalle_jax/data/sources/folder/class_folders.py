"""The classes of a folder whose sub-folders are classes, as ImageNet is usually stored.

    DIR/train/tabby cat/1.jpg, DIR/val/tabby cat/2.jpg      or without splits      DIR/tabby cat/1.jpg

A class is a folder directly below the folder of a split, or below the top without splits. It may have sub-folders.
"""

from __future__ import annotations

from collections.abc import Collection

from dalle_jax.data.sources.folder.splits import Splits


class ClassFolders:
    """Reads the class of an image from its name."""

    def __init__(self, names: Collection[str]):
        """Finds the folders that are splits and no class.

        Args:
          names: the names of the images of all splits, relative to the folder; at least one.
        """
        splits = Splits(names)
        self._above = sorted((*(f"{folder}/" for folder in splits.folders), splits.top), key=len, reverse=True)

    def class_of(self, name: str) -> str | None:
        """Returns the class of an image, or None if it is in no class's folder."""
        above = next((folder for folder in self._above if name.startswith(folder)), "")
        folder, slash, _ = name[len(above) :].partition("/")
        return folder if slash else None
