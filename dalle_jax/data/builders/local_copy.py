"""The base of the TFDS builders that read a user's local copy: writes shard by shard and counts what is left out.

TFDS's usual writer collects a split in memory. Beyond a gigabyte it uses temporary files, for which it imports
TensorFlow. Writing shard by shard takes the memory of one example for a data set of any size, and no TensorFlow.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder  # in tfds.core from 4.9.10 on

from dalle_jax.data.builders.configured import ConfiguredBuilder
from dalle_jax.errors import DataError

_NAMED_PER_REASON = 5  # examples named in the log and in the data set's metadata for each reason

Examples = Iterator[tuple[str, dict[str, Any]]]


class ReadOnce:
    """An encoded image that can be read once and is then released.

    TFDS keeps every example of a shard until the shard is written. Releasing the images keeps its memory small.
    """

    def __init__(self, content: bytes):
        self._content = content

    def read(self) -> bytes:
        content, self._content = self._content, b""
        return content


class LocalCopyBuilder(ConfiguredBuilder, ShardBasedBuilder, skip_registration=True):
    """Base of the builders that read a user's local copy of a data set.

    Damaged files are left out, counted and named, in the log and by split in `info.metadata["left_out"]`. Images and
    captions are stored as they are, without decoding. The pipeline counts and names damaged ones in the runs that use
    them.
    """

    @abc.abstractmethod
    def features(self) -> tfds.features.FeaturesDict:
        """Returns the features of an example."""

    @abc.abstractmethod
    def shards(self, dl_manager) -> Mapping[str, Sequence[Callable[[], Examples]]]:
        """Returns the shards of each split, in order: functions without arguments that yield (key, example).

        Args:
          dl_manager: TFDS's download manager; see `local_copy`.
        """

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=self.features(),
            metadata=tfds.core.MetadataDict(),
            supervised_keys=None,
            disable_shuffling=True,
        )

    def _shard_iterators_per_split(self, dl_manager):
        return self.shards(dl_manager)

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        super()._download_and_prepare(dl_manager, download_config)
        left_out = self.info.metadata.get("left_out", {})
        for split, info in self.info.splits.items():
            if not info.num_examples:
                found = [f"{reason}: {', '.join(each['names'])}" for reason, each in left_out.get(split, {}).items()]
                raise DataError(f"{self.name}: the split {split!r} has no usable example. {'; '.join(found)}".rstrip())

    def local_copy(self, dl_manager) -> epath.Path:
        """Returns the folder with the user's copy (TFDS's `manual_dir`).

        Args:
          dl_manager: TFDS's download manager.

        Raises:
          DataError: if there is no such folder; says which files to download, and where to put them.
        """
        try:
            return epath.Path(dl_manager.manual_dir)
        except AssertionError as error:
            raise DataError(f"{self.name}: {error}\nSet data.path if your copy is in another folder.") from error

    def leave_out(self, split: str, reason: str, name: str) -> None:
        """Counts a damaged example or file, and names the first few.

        Args:
          split: the split that lacks it.
          reason: the heading under which it is counted, a few words.
          name: its name, with what was found.
        """
        tally = self.info.metadata.setdefault("left_out", {}).setdefault(split, {})
        found = tally.setdefault(reason, {"count": 0, "names": []})
        found["count"] += 1
        if len(found["names"]) < _NAMED_PER_REASON:
            found["names"].append(name)
            more = " (further ones are counted only)" if len(found["names"]) == _NAMED_PER_REASON else ""
            logging.warning("%s (%s): left out, %s: %s%s", self.name, split, reason, name, more)

    def pass_over(self, split: str, endings: Sequence[str]) -> None:
        """Counts files that are no part of an example, in `info.metadata["other_files"]`.

        Args:
          split: the split that they stand in.
          endings: their endings, in lower case (".cls").
        """
        if endings:
            tally = self.info.metadata.setdefault("other_files", {}).setdefault(split, {})
            for ending in endings:
                tally[ending] = tally.get(ending, 0) + 1


def read_text(file: epath.Path) -> str:
    """Reads a text file that the data set requires.

    Args:
      file: the file, in UTF-8.

    Raises:
      DataError: if it cannot be read or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}. Copy or download it again.") from error


def in_parts(examples: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cuts a sequence into parts of at most `size`, one for each shard."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]
