"""Finds the captions of the images of a folder.

`data.caption_from` may say that they are made from names. Otherwise a captions table holds those of all images of its
folder and below, and text files next to the other images hold the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from dalle_jax.data.sources.folder.class_folders import ClassFolders
from dalle_jax.data.sources.folder.endings import ending
from dalle_jax.data.sources.folder.listing import Skip
from dalle_jax.data.sources.folder.tables import TABLES, read_table
from dalle_jax.data.sources.source import DataOptions

SECOND_TABLE = "second captions table"

_TEXT_ENDINGS = (".txt", ".caption")
_WORD_ENDS = re.compile(r"[\s_.-]+")
_NUMBER = re.compile(r"[\d()\[\]#+,]*")


class Entry(NamedTuple):
    """An image, with its captions or the place where they are.

    Attributes:
      name: the image's name relative to the folder.
      captions: as read from a table or made from names; None if a text file next to the image would hold them.
      text: the name of this text file; None if it does not exist.
    """

    name: str
    captions: tuple[str | bytes, ...] | None = None
    text: str | None = None


class Captioned(NamedTuple):
    """The images of a folder with their captions.

    Attributes:
      entries: in the order of the tables' rows, then in the order of the names.
      used: the names of the tables and text files that hold the captions.
      skipped: rows of tables, images that no row names, and tables that are not read.
    """

    entries: list[Entry]
    used: set[str]
    skipped: list[Skip]


def find_captions(
    images: Collection[str], files: Collection[str], read: Callable[[str], bytes], options: DataOptions
) -> Captioned:
    """Finds the captions of images.

    Args:
      images: the names of all images, in order.
      files: the names of all files.
      read: reads a table by its name.
      options: `caption_key` and `image_key` name the columns of tables.

    Raises:
      DataError: if a table has no usable row.
    """
    entries, used, left = [], set(), dict.fromkeys(images)
    tables, others = _choose_tables(files)
    skipped = [Skip(SECOND_TABLE, name, name) for name in others]
    image_key = None if options.image_key == DataOptions.image_key else options.image_key
    caption_key = None if options.caption_key == DataOptions.caption_key else options.caption_key
    for name in tables:
        below = {image: None for image in left if image.startswith(_folder(name))}
        table = read_table(name, read(name), below, files, image_key, caption_key)
        entries += [Entry(row.file, row.captions) for row in table.rows]
        unnamed = [image for image in below if image not in table.named]
        skipped += table.skipped + [Skip(f"not in {name[len(_folder(name)) :]}", image, image) for image in unnamed]
        left = {image: None for image in left if image not in below}
    texts = _TextFiles(files)
    entries += [Entry(image, None, texts.of(image)) for image in left]
    used = {*tables, *(entry.text for entry in entries if entry.text)}
    return Captioned(entries, used, skipped)


def captions_from_names(images: Iterable[str], kind: str, split_folders: Collection[str]) -> Captioned:
    """Makes captions from names.

    The words of a name are its parts between blanks, "_", "-" and "."; parts that are numbers are dropped.

    Args:
      images: the names of all images.
      kind: "file_names"; "folder_names" for the name of the folder that holds the image; "paths" for the names of all
        its folders and the file, where a word that repeats is kept once.
      split_folders: names of folders that are splits and therefore no caption.
    """
    entries = []
    for image in images:
        *folders, file = image.split("/")
        title = words(file[: len(file) - len(ending(file))])
        if kind == "file_names":
            caption = title
        elif kind == "paths":
            names = folders[_split_depth(folders, split_folders) :]
            caption = " ".join(dict.fromkeys(" ".join([*map(words, names), title]).split()))
        elif folders and "/".join(folders) not in split_folders:
            caption = words(folders[-1]) or folders[-1]  # a folder "7" holds images of sevens
        else:
            caption = ""
        entries.append(Entry(image, (caption,) if caption else ()))
    return Captioned(entries, set(), [])


def _split_depth(folders: Sequence[str], split_folders: Collection[str]) -> int:
    """Returns how many of the first folders name the split: 2 for `data/train/birds` of the split `data/train`."""
    return next((n for n in range(1, len(folders) + 1) if "/".join(folders[:n]) in split_folders), 0)


def classes_from_folders(images: Sequence[str]) -> Captioned:
    """Makes captions that name classes: the whole name of the class's folder, because `class_1` is not `class_2`.

    Args:
      images: the names of all images of all splits.
    """
    folders = ClassFolders(images) if images else None
    classes = [(image, folders.class_of(image)) for image in images]
    return Captioned([Entry(image, (name,) if name else ()) for image, name in classes], set(), [])


def words(name: str) -> str:
    """Returns the words of a name: its parts between blanks, "_", "-" and ".", without numbers."""
    return " ".join(part for part in _WORD_ENDS.split(name) if not _NUMBER.fullmatch(part))


def _folder(name: str) -> str:
    """Returns the folder of a file with its last "/"; "" at the top."""
    return name[: name.rfind("/") + 1]


def _choose_tables(files: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns the tables to read, at most one on each path from the top, and the other ones."""
    found = [name for name in files if name[len(_folder(name)) :].lower() in TABLES]
    found.sort(key=lambda name: (name.count("/"), TABLES.index(name[len(_folder(name)) :].lower()), name))
    chosen, others = [], []
    for name in found:
        is_second = any(name.startswith(_folder(table)) for table in chosen)
        (others if is_second else chosen).append(name)
    return chosen, others


class _TextFiles:
    """Finds the text file of an image: `a.txt`, `a.png.txt`, `a.caption` or `a.png.caption`, in any case of letters."""

    def __init__(self, files: Iterable[str]):
        self._names: dict[str, list[str]] = {}  # by the name in lower case
        for name in files:
            if ending(name) in _TEXT_ENDINGS:
                self._names.setdefault(name.lower(), []).append(name)

    def of(self, image: str) -> str | None:
        """Returns the text file of an image, or None. The one with the image's own letters comes first."""
        stem = image[: len(image) - len(ending(image))]
        for text_ending in _TEXT_ENDINGS:
            for base in (stem, image):
                if found := self._names.get((base + text_ending).lower()):
                    return min(found, key=lambda name: (not name.startswith(base), name))
        return None
