"""What the TFDS builders over a user's own files share: writing shard by shard, and a tally of what had to be left out.

TFDS's usual writer collects a split in memory and, beyond a gigabyte, in temporary files for which it imports
TensorFlow. Written shard by shard, a data set of any size takes the memory of one example, and no TensorFlow.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core.dataset_builder import ShardBasedBuilder  # tfds.core has it from 4.9.10 on

from dalle_jax.errors import DataError

_NAMED_PER_REASON = 5  # so many are named in the log and in the data set's metadata

Examples = Iterator[tuple[str, dict[str, Any]]]


class ReadOnce:
    """An encoded picture that TFDS can read once, and that is let go then.

    TFDS holds on to every example of a shard until the shard is written; the pictures need not be among that.
    """

    def __init__(self, content: bytes):
        self._content = content

    def read(self) -> bytes:
        content, self._content = self._content, b""
        return content


class OwnCopyBuilder(ShardBasedBuilder, skip_registration=True):
    """Base of the builders over a user's own files; keyword arguments are those of `CONFIG`.

    What is damaged is left out, counted and named: in the log, and by split in `info.metadata["left_out"]`. Pictures
    are written as they are, without decoding them, and so are captions: what is wrong with those is found, counted and
    named by the pipeline, in the runs that use them.
    """

    CONFIG: ClassVar[type[tfds.core.BuilderConfig]]

    def __init__(
        self,
        *,
        config: tfds.core.BuilderConfig | None = None,
        file_format: str = "array_record",
        data_dir=None,
        version=None,
        **options: Any,
    ):
        config = config or self.CONFIG(**options)
        super().__init__(config=config, file_format=file_format, data_dir=data_dir, version=version)

    def _create_builder_config(self, builder_config, version):
        return builder_config  # TFDS would warn, at every opening, of all not listed in advance

    @abc.abstractmethod
    def features(self) -> tfds.features.FeaturesDict:
        """The features of an example."""

    @abc.abstractmethod
    def shards(self, dl_manager) -> Mapping[str, Sequence[Callable[[], Examples]]]:
        """For each split the shards to write, in order: functions without arguments that yield (key, example)."""

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
                raise DataError(
                    f"{self.name}: no example of the split {split!r} is usable. {'; '.join(found)}".rstrip()
                )

    def own_copy(self, dl_manager) -> epath.Path:
        """The folder with the user's copy (TFDS's `manual_dir`).

        Raises:
          DataError: where there is none; says what to put where.
        """
        try:
            return epath.Path(dl_manager.manual_dir)
        except AssertionError as error:
            raise DataError(f"{self.name}: {error}\nA copy that lies elsewhere is given as data.path.") from error

    def leave_out(self, split: str, reason: str, name: str) -> None:
        """Counts something damaged, and names the first few.

        Args:
          split: that lacks it.
          reason: the heading under which it is counted, a few words.
          name: which one, with what was found.
        """
        tally = self.info.metadata.setdefault("left_out", {}).setdefault(split, {})
        found = tally.setdefault(reason, {"count": 0, "names": []})
        found["count"] += 1
        if len(found["names"]) < _NAMED_PER_REASON:
            found["names"].append(name)
            more = " (further ones are counted only)" if len(found["names"]) == _NAMED_PER_REASON else ""
            logging.warning("%s (%s): left out, %s: %s%s", self.name, split, reason, name, more)


def read_text(file: epath.Path) -> str:
    """The content of a text file that the data set cannot do without.

    Raises:
      DataError: where it cannot be read or is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}. Copy or download it again.") from error


def in_parts(examples: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Cuts a sequence into stretches of at most `size`, one for each shard."""
    return [examples[start : start + size] for start in range(0, len(examples), size)]
