"""Reads the images and captions of a folder."""

from __future__ import annotations

import collections
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from etils import epath

from dalle_jax.data.sources.decoding import decode_image
from dalle_jax.data.sources.folder.captions import (
    Captioned,
    Entry,
    captions_from_names,
    classes_from_folders,
    find_captions,
)
from dalle_jax.data.sources.folder.endings import ending, readable_endings
from dalle_jax.data.sources.folder.listing import File, Listing, Skip, list_folder
from dalle_jax.data.sources.folder.selection import select
from dalle_jax.data.sources.folder.splits import Splits
from dalle_jax.data.sources.record import Record, UnreadableExample
from dalle_jax.data.sources.source import DataOptions, LeftOut, Source, decode_captions
from dalle_jax.errors import DataError
from dalle_jax.storage.files import expanded, is_remote

NO_ENDING = "no ending"

_NAMED_PER_REASON = 5


class FolderSource(Source):
    """The images of a folder, in the order of the rows of its captions table or of their names."""

    def __init__(self, path: epath.PathLike, split: str = "all", options: DataOptions | None = None):
        """Lists the folder and reads its captions table. Images and text files are read on request.

        If few images are held out by hash, some are read here to find one that is not damaged.

        Args:
          path: the folder, local or remote; `~` and "file://" are understood.
          split: "train", "validation", "all", or the name of a sub-folder (splits.py).
          options: the origin of the captions, and the names of both splits, so that neither reads the other's folder.

        Raises:
          DataError: if the folder does not exist, holds no images or lacks the split, or if its table is not usable.
        """
        options = DataOptions() if options is None else options
        self._root = root = expanded(path)
        self._first_line_only = options.caption_lines == "first"
        self._limits = options.limits
        if not root.is_dir():
            raise DataError(f"config.data.path is {path}, which is not a folder: give the folder with the images.")
        if options.train_split == "all" and split != "all":
            raise DataError(
                f"config.data.train_split is 'all', so nothing is held out for the split {split!r}. Set "
                "config.data.train_split=train, or evaluate on training images: config.data.eval_split=all."
            )
        try:
            listing = list_folder(root)
        except OSError as error:
            raise DataError(f"config.data.path is {path}, which cannot be listed: {error}.") from error
        files, found = listing.files, self._captioned(listing, options)
        self._too_large = {
            name: size for name, (size, *_) in files.items() if (size or 0) > self._limits.max_file_bytes
        }
        skipped = listing.skipped + found.skipped
        images = {entry.name: files[entry.name] for entry in found.entries}
        self.other_files = _other_files(files, {*images, *found.used, *(skip.place for skip in skipped)})
        if not images:
            raise DataError(_nothing_found(root, self.other_files, _left_out(skipped)))
        selected = select(split, _other_split(split, options), images, skipped, self._is_readable(found.entries))
        self._entries = [entry for entry in found.entries if entry.name in selected.names]
        self.left_out = _left_out(selected.skipped)
        self.description = f"{root} ({split})"
        if not self._entries:
            raise DataError(
                f"{self.description} holds no images, but {root} holds {len(images)}. Add images, or set "
                "data.train_split and data.eval_split to sub-folders or 'all'."
            )
        if not is_remote(root):
            self.identity = _identity(root, self._entries, files, self._first_line_only)
            self.image_identity = _image_identity(self._entries, files)
        if not any(entry.captions or entry.text for entry in self._entries):
            self.captions_missing = (
                f"{self.description}: none of the {len(self._entries)} images has a caption. Write captions.csv with "
                "the columns file and caption, or a text file for each image (cat.txt next to cat.png). Or use names: "
                "--config.data.caption_from=file_names, folder_names or paths (both)."
            )

    def _captioned(self, listing: Listing, options: DataOptions) -> Captioned:
        readable = readable_endings()
        images = sorted(name for name in listing.files if ending(name) in readable)
        if options.caption_from == "files":
            try:
                return find_captions(images, listing.files, lambda name: (self._root / name).read_bytes(), options)
            except (DataError, OSError) as error:
                raise DataError(f"{self._root}: {error}") from error
        if options.names_classes:
            return classes_from_folders(images)
        folders = Splits(images).folders if images else ()
        return captions_from_names(images, options.caption_from, folders)

    def _is_readable(self, entries: Iterable[Entry]) -> Callable[[str], bool]:
        """Returns a function of a name: whether its image and, if the folder has captions, its caption can be read."""
        by_name = collections.defaultdict(list)
        for entry in entries:
            by_name[entry.name].append(entry)
        with_captions = any(entry.captions or entry.text for entry in entries)

        def is_readable(name: str) -> bool:
            for entry in by_name[name]:
                try:
                    record = self._read(entry)
                    decode_image(record, self._limits)
                    if with_captions:
                        decode_captions(record)
                    return True
                except UnreadableExample:
                    continue
            return False

        return is_readable

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, index: int) -> Record:
        return self._read(self._entries[index])

    def without_image(self, index: int) -> Record:
        """See `Source.without_image`. The image is not read."""
        entry = self._entries[index]
        return Record(b"", self._captions_of(entry), entry.name, {})

    def captions(self) -> Iterator[str]:
        """See `Source.captions`. No image is read.

        Raises:
          DataError: at once, if no image has a caption.
        """
        if self.captions_missing:
            raise DataError(self.captions_missing)
        return super().captions()

    def captions_of(self, index: int) -> list[str]:
        """See `Source.captions_of`. The image is not read."""
        try:
            return decode_captions(self.without_image(index))
        except UnreadableExample:
            return []

    def _read(self, entry: Entry) -> Record:
        for name in (entry.name, entry.text):
            if name in self._too_large:
                found = f"{self._too_large[name]:,} bytes, data.max_file_bytes is {self._limits.max_file_bytes:,}"
                raise UnreadableExample("file too large", name, found)
        try:
            image = (self._root / entry.name).read_bytes()
        except OSError as error:
            reason = "missing file" if isinstance(error, FileNotFoundError) else "unreadable file"
            raise UnreadableExample(reason, entry.name, str(error)) from error
        return Record(image, self._captions_of(entry), entry.name, {})

    def _captions_of(self, entry: Entry) -> tuple[str | bytes, ...]:
        if entry.captions is not None:
            return entry.captions
        if entry.text in self._too_large:
            return ()
        try:
            lines = (self._root / entry.text).read_bytes().splitlines() if entry.text else []
        except OSError:
            return ()
        if self._first_line_only:
            lines = [line for line in lines if line.removeprefix(b"\xef\xbb\xbf").strip()][:1]
        return tuple(lines)


def _other_split(split: str, options: DataOptions) -> str:
    """Returns the split that must not share an image with `split`."""
    return options.eval_split if split == options.train_split else options.train_split


def _other_files(files: Collection[str], used: Collection[str]) -> dict[str, int]:
    """Counts the files that are passed over by their endings."""
    counts = collections.Counter(ending(name) or NO_ENDING for name in files if name not in used)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _left_out(skipped: Iterable[Skip]) -> tuple[LeftOut, ...]:
    labels = collections.defaultdict(list)
    for skip in skipped:
        labels[skip.reason].append(skip.label)
    return tuple(
        LeftOut(reason, len(found), tuple(found[:_NAMED_PER_REASON])) for reason, found in sorted(labels.items())
    )


def _nothing_found(root: epath.Path, other_files: Mapping[str, int], left_out: Iterable[LeftOut]) -> str:
    """Returns the message for a folder without images."""
    found = [f"{count} {kind}" for kind, count in other_files.items()]
    found += [f"{each.count} {each.reason} ({', '.join(each.names)})" for each in left_out]
    shards = " For tar shards set data.source=tar_shards." if ".tar" in other_files else ""
    return (
        f"{root} holds no images ({', '.join(readable_endings())}). It holds {', '.join(found) or 'nothing'}. "
        f"Set data.path to the folder of your images.{shards}"
    )


def _identity(root: epath.Path, entries: Iterable[Entry], files: Mapping[str, File], first_line_only: bool) -> str:
    """Returns a text that changes with the examples: names, sizes, times of change, and captions."""
    digest = hashlib.sha256(repr((os.path.realpath(root), first_line_only)).encode("utf-8", "surrogateescape"))
    for entry in entries:
        file, text = files[entry.name], files[entry.text] if entry.text else File()
        digest.update(repr((*entry, file.size, file.modified, text.size, text.modified)).encode())
    return f"folder {digest.hexdigest()}"


def _image_identity(entries: Iterable[Entry], files: Mapping[str, File]) -> str:
    """Returns a text that changes with the images: their order, names inside the folder, sizes and times of change."""
    digest = hashlib.sha256()
    for entry in entries:
        file = files[entry.name]
        digest.update(repr((entry.name, file.size, file.modified)).encode("utf-8", "surrogateescape"))
    return f"images {digest.hexdigest()}"
