"""Lists the regular files of a folder and of its sub-folders.

Nothing is opened here. Hidden files and folders are left out, and also those that systems and programs add: `__MACOSX`,
`@eaDir`, `Thumbs.db`, … A link to a file is listed if it leads to a regular file. A link to a folder is followed unless
it leads to a folder above it or to one that is listed already. Each folder is thus listed once, and listing ends.
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from etils import epath

from dalle_jax.data.sources.once import once
from dalle_jax.storage.files import is_remote

_ADDED_BY_PROGRAMS = frozenset(
    ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db")
)

LINK_BACK = "link to a folder that is listed already"
HIDDEN_FOLDER = "hidden folder"
NOT_UTF8 = "name that is not UTF-8"
NOT_REGULAR = "not a regular file"
UNREADABLE_FOLDER = "unreadable folder"


class Skip(NamedTuple):
    """Something that was left out.

    Attributes:
      reason: the heading under which it is counted, a few words.
      label: its name, and the place in a table, for messages.
      place: the name of the file or folder that it belongs to, relative to the listed folder.
    """

    reason: str
    label: str
    place: str


class File(NamedTuple):
    """A regular file.

    Attributes:
      size: in bytes; None if remote.
      modified: time of the last change in nanoseconds; None if remote.
      same: equal for two names of one file (device and inode); None if that is unknown.
      is_link: whether the name is a link.
    """

    size: int | None = None
    modified: int | None = None
    same: tuple[int, int] | None = None
    is_link: bool = False


@dataclasses.dataclass
class Listing:
    """The files below a folder.

    Attributes:
      files: every regular file by its name relative to the folder ("a/b.png"), in no certain order.
      skipped: what was left out.
    """

    files: dict[str, File] = dataclasses.field(default_factory=dict)
    skipped: list[Skip] = dataclasses.field(default_factory=list)

    def skip(self, reason: str, name: str) -> None:
        """Counts something that is left out under a reason."""
        label = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        self.skipped.append(Skip(reason, label, name))


def list_folder(root: epath.Path) -> Listing:
    """Lists a local folder with one call for each folder and file, or a remote one with one call for each folder.

    Args:
      root: the folder; it exists.

    Returns:
      The listing, to be read only: in an `opened_once` block others get the same one.

    Raises:
      OSError: if the folder itself cannot be read.
    """
    return once(("listing", os.fspath(root)), lambda: _remote(root) if is_remote(root) else _local(root))


def _local(root: epath.Path) -> Listing:
    listing, links, listed = Listing(), [], set()
    pending = [(os.fspath(root), "")]
    while pending or links:
        # Links come last. A folder is thus listed under its real name if it has one here.
        path, prefix = pending.pop() if pending else links.pop(0)
        for entry, is_folder in _entries(path, prefix, listing, listed):
            name = prefix + entry.name
            if not is_folder:
                _add_file(entry, name, listing)
            elif not entry.is_symlink():
                pending.append((entry.path, f"{name}/"))
            elif _leads_up(entry.path, path, root):
                listing.skip(LINK_BACK, name)
            else:
                links.append((entry.path, f"{name}/"))
        links.sort(key=lambda link: link[1])
    return listing


def _entries(path: str, prefix: str, listing: Listing, listed: set) -> Iterator[tuple[os.DirEntry, bool]]:
    """Yields the entries of a folder that is not listed yet and whether they are folders, without the hidden ones."""
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in listed:
            listing.skip(LINK_BACK, prefix.rstrip("/"))
            return
        with os.scandir(path) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        if not prefix:
            raise
        listing.skip(UNREADABLE_FOLDER, prefix.rstrip("/"))
        return
    listed.add((status.st_dev, status.st_ino))
    for entry in entries:
        name = prefix + entry.name
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link to itself
            listing.skip(NOT_REGULAR, name)
            continue
        if _is_hidden(entry.name):
            if is_folder:
                listing.skip(HIDDEN_FOLDER, name)
        elif not _is_utf8(entry.name):
            listing.skip(NOT_UTF8, name)
        else:
            yield entry, is_folder


def _add_file(entry: os.DirEntry, name: str, listing: Listing) -> None:
    try:
        status = entry.stat()
    except OSError:  # a link to nothing
        listing.skip(NOT_REGULAR, name)
        return
    if not stat.S_ISREG(status.st_mode):  # a device, a pipe or a socket: reading it might never end
        listing.skip(NOT_REGULAR, name)
        return
    same = (status.st_dev, status.st_ino) if status.st_ino else None
    listing.files[name] = File(status.st_size, status.st_mtime_ns, same, entry.is_symlink())


def _leads_up(link: str, folder: str, root: epath.Path) -> bool:
    """Whether a link in a folder leads to that folder, to one above it, or to one above the root."""
    target = os.path.join(os.path.realpath(link), "")
    return any(os.path.join(os.path.realpath(below), "").startswith(target) for below in (folder, root))


def _remote(root: epath.Path) -> Listing:
    listing, top = Listing(), _without_scheme(root)
    for folder, folders, files in root.walk():
        parts = _without_scheme(folder)[len(top) :]
        if any(_is_hidden(part) for part in parts):
            continue
        prefix = "".join(f"{part}/" for part in parts)
        for name in sorted(folders):
            if _is_hidden(name):
                listing.skip(HIDDEN_FOLDER, prefix + name)
        for name in sorted(files):
            if name and not _is_hidden(name):  # some stores keep an empty object for each folder
                listing.files[prefix + name] = File()
    return listing


def _without_scheme(path: epath.Path) -> list[str]:
    """Returns the parts of a remote path. Some file systems list "gs://bucket/a" as "bucket/a"."""
    return os.fspath(path).split("://")[-1].strip("/").split("/")


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _ADDED_BY_PROGRAMS


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
        return True
    except UnicodeEncodeError:
        return False
