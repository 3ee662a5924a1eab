"""The classes of a folder whose sub-folders are classes, as ImageNet is usually stored.

    DIR/train/tabby cat/1.jpg, DIR/val/tabby cat/2.jpg      or without splits      DIR/tabby cat/1.jpg

A class is a folder directly below the folder of a split, or below the top without splits. It may have sub-folders.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from dalle_jax.data.sources.folder.splits import Splits
from dalle_jax.data.sources.record import Record
from dalle_jax.data.sources.source import Source
from dalle_jax.errors import DataError


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


class Labelled(Source):
    """A folder source whose caption is the number of the image's class, as `Labels` encodes it: "class: 7"."""

    def __init__(self, source: Source, folders: ClassFolders, classes: Sequence[str]):
        """Reads the class of every image.

        Args:
          source: a split of the folder.
          folders: of the whole folder.
          classes: the names of the classes, class 0 first.

        Raises:
          DataError: an image has no class, or one that `classes` lacks.
        """
        self._source, self._numbers = source, []
        numbers = {name: number for number, name in enumerate(classes)}
        for index in range(len(source)):
            image = source.without_image(index).name
            if (found := folders.class_of(image)) not in numbers:
                raise DataError(
                    f"{source.description}: {image} is in no class's folder. Expected one of {len(classes)} classes, "
                    f"such as {', '.join(classes[:3])}."
                )
            self._numbers.append(numbers[found])
        self.description, self.identity, self.image_identity = (
            source.description,
            source.identity,
            source.image_identity,
        )
        self.left_out, self.other_files, self.limits = source.left_out, source.other_files, source.limits

    def __len__(self) -> int:
        return len(self._source)

    def record(self, index: int) -> Record:
        """See `Source.record`."""
        return self._with_class(self._source.record(index), index)

    def without_image(self, index: int) -> Record:
        """See `Source.without_image`."""
        return self._with_class(self._source.without_image(index), index)

    def _with_class(self, record: Record, index: int) -> Record:
        return dataclasses.replace(record, captions=(f"class: {self._numbers[index]}",))


def labelled(sources: Sequence[Source], classes: Sequence[str] = ()) -> tuple[list[Labelled], list[str]]:
    """Labels the splits of a folder with their classes.

    Args:
      sources: the splits, the training split first.
      classes: the names of the classes; () for those of the training split, sorted.

    Returns:
      The labelled splits, and the names of the classes.

    Raises:
      DataError: fewer than two classes, or an image without one.
    """
    names = [[source.without_image(index).name for index in range(len(source))] for source in sources]
    folders = ClassFolders([name for of_split in names for name in of_split])
    classes = list(classes) or sorted({folders.class_of(name) for name in names[0]} - {None})
    if len(classes) < 2:
        raise DataError(
            f"{sources[0].description} has images of {len(classes)} classes; expected a folder whose sub-folders are "
            "at least 2 classes: DIR/cat/1.png, DIR/dog/2.png."
        )
    return [Labelled(source, folders, classes) for source in sources], classes
