"""A data set with random access from image–caption tar shards, as img2dataset and WebDataset write them.

    DIR/00000.tar, DIR/00001.tar, …     each with 000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg, …

Images are members with one of the usual endings. The caption is the content of the .txt (.caption, .cap), or "caption"
in the .json; see reading.py. Shards may be compressed (.tar.gz, .tgz).

Splits: if DIR holds the shards, a twentieth of the samples is "validation" and the rest is "train". A hash of a
sample's key decides, so that no sample changes sides when others are added. If sub-folders hold the shards
(DIR/train/00000.tar), each sub-folder is the split of its name.

The samples are copied once into TFDS's files, shard by shard and in order, which costs disk space. Reading the shards
in place would need an index of their members, and so a pass over every header. Compressed shards have no random access.
Each example would need two or three reads (requests on remote storage) instead of one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import tensorflow_datasets as tfds
from etils import epath

from dalle_jax.data.builders.local_copy import Examples, LocalCopyBuilder, ReadOnce
from dalle_jax.data.builders.made_from import fingerprint
from dalle_jax.data.builders.tar_shards import reading
from dalle_jax.data.builders.tar_shards.listing import Shards, find_shards
from dalle_jax.data.sources.decoding import Limits
from dalle_jax.errors import DataError

_VALIDATION_SHARE = 20
_TRIED = 100  # samples that are read before the caption key counts as absent
_MAX_KEYS = 50  # of .json files, for messages

Wanted = Callable[[str], bool]


@dataclasses.dataclass(eq=False, kw_only=True)
class TarShardsConfig(tfds.core.BuilderConfig):
    """The choice of shards. Their path, names, sizes, times and parts of their content distinguish copies on disk.

    Attributes:
      path: their folder, or a glob ("DIR/000[0-4]*.tar"), local or remote.
      caption_key: the key of the .json that holds the caption; see `reading.read_samples`.
      max_file_bytes: the most bytes of a member.
      found: the shards of each split.
    """

    name: str = dataclasses.field(init=False)
    path: str
    caption_key: str = "caption"
    max_file_bytes: int = Limits.max_file_bytes
    found: Shards = dataclasses.field(init=False)

    def __post_init__(self):
        self.found = find_shards(self.path)
        files = [shard for shards in self.found.splits.values() for shard in shards]
        made_from = fingerprint(self.found.root, files, [self.caption_key, self.max_file_bytes])
        self.name = f"shards{len(files)}_{made_from}"


class Builder(LocalCopyBuilder):
    """TFDS builder `tar_shards`; keyword arguments are those of `TarShardsConfig`.

    Features: `image` (in its original encoding), `caption` (zero or more), `file` (shard and key).
    """

    VERSION = tfds.core.Version("2.0.0")
    CONFIG = TarShardsConfig

    def features(self) -> tfds.features.FeaturesDict:
        return tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(),
                "caption": tfds.features.Sequence(tfds.features.Text()),
                "file": tfds.features.Text(),
            }
        )

    def shards(self, dl_manager):
        found = self.builder_config.found
        self._check_caption_key(itertools.chain.from_iterable(found.splits.values()))
        parts = {split: _everything for split in found.splits}
        if "" in found.splits:
            parts = _divide(found.splits[""])
        for split in parts:
            for name in found.no_splits:
                self.leave_out(split, "folder that cannot be a split", name)
        return {
            split: [
                functools.partial(self._examples, split, shard, wanted)
                for shard in found.splits.get(split, found.splits.get(""))
            ]
            for split, wanted in parts.items()
        }

    def _check_caption_key(self, shards: Iterable[epath.Path]) -> None:
        """Raises an error before an hour of writing if the metadata of the first samples lack the caption key."""
        wanted, keys = self.builder_config.caption_key, collections.Counter()
        if wanted == "caption":
            return
        for sample in itertools.islice(self._samples(shards), _TRIED):
            if reading.has_key(sample, wanted):
                return
            keys.update(sample.metadata_keys)
        raise DataError(
            f"data.caption_key is {wanted!r}, but the .json files in {self.builder_config.path} have no such key "
            f"({_TRIED} samples tried). They have: {', '.join(sorted(keys)) or 'nothing'}."
        )

    def _samples(self, shards: Iterable[epath.Path]) -> Iterator[reading.Sample]:
        for shard in shards:
            try:
                with shard.open("rb") as file:
                    yield from reading.read_samples(file, max_bytes=self.builder_config.max_file_bytes)
            except (reading.DamagedShard, OSError):
                continue  # counted when the shard is copied

    def _examples(self, split: str, shard: epath.Path, wanted: Wanted) -> Examples:
        options = self.builder_config
        try:
            with shard.open("rb") as file:
                for sample in reading.read_samples(file, wanted, options.caption_key, options.max_file_bytes):
                    name = f"{shard.name}/{sample.key}".encode("utf-8", "backslashreplace").decode()
                    self.pass_over(split, sample.other_endings)
                    for member in sample.too_large:
                        self.leave_out(split, "file too large", f"{shard.name}/{member}")
                    if sample.image is None:
                        if not sample.too_large and (sample.captions or sample.metadata_keys):
                            self.leave_out(split, "missing image", name)
                        continue
                    self._note_captions(sample)
                    yield name, {"image": ReadOnce(sample.image), "caption": list(sample.captions), "file": name}
        except (reading.DamagedShard, OSError) as error:
            self.leave_out(split, "damaged shard", f"{shard.name} ({error})")

    def _note_captions(self, sample: reading.Sample) -> None:
        """Counts the captions, and keeps the keys of .json files without one for the message."""
        facts = self.info.metadata
        facts["captions"] = facts.get("captions", 0) + len(sample.captions)
        if not sample.captions and len(keys := set(facts.get("metadata_keys", []))) < _MAX_KEYS:
            facts["metadata_keys"] = sorted(keys.union(sample.metadata_keys))[:_MAX_KEYS]


def _everything(key: str) -> bool:
    return True


def _is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode("utf-8", "surrogateescape")) < 2**32 // _VALIDATION_SHARE


def _divide(shards: Sequence[epath.Path]) -> Mapping[str, Wanted]:
    """Returns which keys each split holds. If the hash holds out none of a few samples, the nearest one is held out."""
    keys = set()
    for shard in shards:
        try:
            with shard.open("rb") as file:
                for key in reading.read_keys(file):
                    if _is_held_out(key):
                        return {"train": lambda key: not _is_held_out(key), "validation": _is_held_out}
                    keys.add(key)
        except OSError:
            continue  # counted when the shard is copied
    nearest = min(keys, key=lambda key: (zlib.crc32(key.encode("utf-8", "surrogateescape")), key), default="")
    # A single image cannot be divided, so it is in both splits.
    train = _everything if len(keys) < 2 else lambda key: key != nearest
    return {"train": train, "validation": lambda key: key == nearest}
