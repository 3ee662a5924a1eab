"""Selects the images of a split, so that no image is in training and in validation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from dalle_jax.data.sources.folder.listing import File, Skip
from dalle_jax.data.sources.folder.splits import Splits, held_out_by_hash
from dalle_jax.errors import DataError

OUTSIDE_OF_SPLITS = "outside of the splits' folders"
ALSO_IN_TRAINING = "link to a training image"

_MOST_FOLDERS_NAMED = 20


class Selection(NamedTuple):
    """A split of a folder.

    Attributes:
      names: its images.
      skipped: what it lacks. Each `Skip` of the folder belongs to one split, so that the counts of splits add up.
    """

    names: set[str]
    skipped: list[Skip]


def select(
    split: str,
    other: str | None,
    files: Mapping[str, File],
    skipped: list[Skip],
    is_readable: Callable[[str], bool],
) -> Selection:
    """Selects the images of a split.

    Args:
      split: "all", "train", "validation", another split's name, or the name of a sub-folder.
      other: the split on the other side of the training, whose folder is left out; None if there is no other side.
      files: every image by its name, at least one.
      skipped: what the folder lacks.
      is_readable: whether an image can be read, by name (`held_out_by_hash`).

    Raises:
      DataError: if the folder has no such split. It lists the splits that exist.
    """
    if split == "all":
        return Selection(set(files), skipped)
    splits = Splits(files)
    own_folder, other_folder = _folder(split, splits, files), _folder(other, splits, files)
    pool = set(files)
    if other_folder and not (own_folder or "").startswith(other_folder):
        pool = {name for name in files if not name.startswith(other_folder)}
    key = splits.called(split) if splits.held_out else None
    real = _real_names(files)
    if key == "train":
        outside = sorted(name for name in files if splits.side(name) is None)
        own = [skip for skip in skipped if splits.side(skip.place) in ("train", None)]
        own += [Skip(OUTSIDE_OF_SPLITS, name, name) for name in outside]
        return Selection({name for name in pool if splits.side(name) == "train"}, own)
    if key:
        trained = {real[name] for name in files if splits.side(name) == "train"}
        names = {name for name in pool if splits.side(name) == key}
        links = {name for name in names if real[name] in trained}
        own = [skip for skip in skipped if splits.side(skip.place) == key]
        return Selection(names - links, own + [Skip(ALSO_IN_TRAINING, name, name) for name in sorted(links)])
    if split in ("train", "validation"):
        held_out = held_out_by_hash({real[name] for name in pool}, is_readable)
        is_training = split == "train"
        names = {name for name in pool if (real[name] in held_out) != is_training}
        return Selection(names, skipped if is_training else [])
    if own_folder:
        names = {name for name in pool if name.startswith(own_folder)}
        return Selection(names, [skip for skip in skipped if f"{skip.place}/".startswith(own_folder)])
    raise DataError(
        f"The folder has no split {split!r}. It has 'train', 'validation', 'all', and the sub-folders "
        f"{_sub_folders(files)}: set data.train_split and data.eval_split to one of them."
    )


def _folder(split: str | None, splits: Splits, names: Collection[str]) -> str | None:
    """Returns the folder that a split's name stands for, with its last "/"; None if it stands for no folder."""
    if split is None or split == "all":
        return None
    key = splits.called(split) if splits.held_out else None
    if key == "train":
        return splits.train
    if key:
        return splits.held_out[key]
    if split in ("train", "validation"):
        return None
    folders = (f"{top}{split.strip('/')}/" for top in ("", splits.top))
    return next((folder for folder in folders if any(name.startswith(folder) for name in names)), None)


def _real_names(files: Mapping[str, File]) -> dict[str, str]:
    """Returns one name for all names of the same file: the name that is no link, if there is one."""
    first: dict = {}
    for name in sorted(files, key=lambda name: (files[name].is_link, name)):
        first.setdefault(files[name].same or name, name)
    return {name: first[file.same or name] for name, file in files.items()}


def _sub_folders(names: Iterable[str]) -> str:
    found = sorted({name.split("/")[0] for name in names if "/" in name})
    return ", ".join(map(repr, found[:_MOST_FOLDERS_NAMED])) + (", …" if len(found) > _MOST_FOLDERS_NAMED else "")
