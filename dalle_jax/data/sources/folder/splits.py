"""Divides the images of a folder into training and validation.

Sub-folders are the splits if both sides exist: `train` with one of the names in `HELD_OUT`. Without `train`, a folder
`validation` is held out from everything else. `test` and `dev` may be names of classes, so without `train` they are
held out only from images at the top. Otherwise the hash of an image's name decides, and about one in 20 is held out.

Adding images moves no other image to the other side, except in the smallest sets. If no hash is below the threshold,
the image with the smallest hash is held out. If none of a few held-out images can be read, the next one that can be
read is held out, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable

TRAIN = ("train", "training")
# Without `train`, these are held out from all other images.
_CLEARLY_HELD_OUT = ("validation", "valid", "val", "heldout", "held_out")
# The first of these that exists is "validation".
HELD_OUT = (*_CLEARLY_HELD_OUT, "dev", "test")

_SHARE = 20
_FEW = 8  # held-out images that might all be damaged


class Splits:
    """The sub-folders of a folder that are its splits.

    Attributes:
      top: the folder in which they are: "", or "a/" if everything is in the folder a.
      train: the training split's folder with its last "/"; None if all images outside of `held_out` are for training.
      held_out: the other splits' folders by name in lower case, in the order of `HELD_OUT`; {} if there are no splits.
    """

    def __init__(self, images: Collection[str]):
        """Finds the splits.

        Args:
          images: the names of all images, at least one.
        """
        self.top, folders = _wrapper(images), {}
        for image in images:
            folder, slash, _ = image[len(self.top) :].partition("/")
            folders.setdefault(folder.lower() if slash else "", f"{self.top}{folder}/")
        self.train = next((folders[name] for name in TRAIN if name in folders), None)
        names = HELD_OUT if self.train or "" in folders else _CLEARLY_HELD_OUT
        self.held_out = {name: folders[name] for name in names if name in folders}
        if not self.held_out or len(self.held_out) == len(folders):  # both sides must exist
            self.train, self.held_out = None, {}

    def side(self, name: str) -> str | None:
        """Returns the split of an image or another file: "train", a key of `held_out`, or None if it is in neither."""
        for split, folder in self.held_out.items():
            if f"{name}/".startswith(folder):
                return split
        return "train" if self.train is None or f"{name}/".startswith(self.train) else None

    def called(self, split: str) -> str | None:
        """Returns the key of a split for `side`, or None: "validation" may be the folder `val`."""
        if split == "validation":
            return next(iter(self.held_out), None)
        return split.lower() if split.lower() in self.held_out or split == "train" else None

    @property
    def folders(self) -> set[str]:
        """The names of the folders that are splits, without the last "/"."""
        return {folder.rstrip("/") for folder in (*self.held_out.values(), self.train) if folder}


def held_out_by_hash(names: Iterable[str], is_readable: Callable[[str], bool]) -> set[str]:
    """Returns the names that are held out for validation: about a twentieth, and at least one of two.

    Args:
      names: the names of all images.
      is_readable: whether an image can be read. It is called only if few are held out, until it accepts one.
    """
    hashes = {name: int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") for name in names}
    ordered = sorted(hashes, key=lambda name: (hashes[name], name))
    candidates = ordered[:-1]  # one is always left for training
    count = sum(hashes[name] < 2**64 // _SHARE for name in candidates)
    held_out = candidates[: max(count, 1)]
    if len(held_out) < _FEW:
        readable = next((name for name in candidates if is_readable(name)), None)
        held_out += [readable] if readable is not None and readable not in held_out else []
    return set(held_out)


def _wrapper(images: Collection[str]) -> str:
    """Returns the folder that holds all images, "a/b/"; "" if none does."""
    first, last, top = min(images), max(images), ""
    while (end := first.find("/", len(top))) >= 0 and last.startswith(first[: end + 1]):
        top = first[: end + 1]
    return top
