"""The job of `configs/encode.py`: encodes the images of a split to tokens once, for trainings that read only these.

The split is encoded in parts of 4,096 examples. A run that was killed resumes with the first part that is missing or
damaged. Several hosts share the parts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator

import jax
from absl import logging
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data import token_store
from dalle_jax.data.sources.once import opened_once
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.own import choose_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.token_store import TokenStore
from dalle_jax.distributed import host_values
from dalle_jax.distributed.turns import first_host_first, joined
from dalle_jax.distributed.watchdog import Watchdog
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.jobs.tokenizers import has_tokenizer
from dalle_jax.pytree import PyTree
from dalle_jax.storage.files import check_writable, is_remote
from dalle_jax.tasks.encoded_split import describe, fill

_SECONDS = 10.0  # between two lines of the log
_LONGEST_SECONDS = 7 * 24 * 3600.0  # that one host waits for another that is alive


def run(config: ConfigDict, workdir: str) -> TokenStore:
    """Encodes `data.train_split`, or the parts of it that `workdir` lacks.

    Args:
      config: see `configs/encode.py`.
      workdir: folder of the tokens. It also gets a copy of the image tokenizer, so that a training needs this folder
        alone.

    Returns:
      The tokens.

    Raises:
      ConfigError: see `check`, or `workdir` holds the tokens of other images or of another tokenizer.
      DataError: the data set cannot be opened, or holds no readable image.
      UserError: a file cannot be written.
    """
    options, tokenizer, params = check(config, workdir)
    with opened_once():
        source = open_source(options, options.train_split)
        store = TokenStore(workdir, describe(options, source, tokenizer, params))
        if store.description.images is None:
            logging.warning(
                "%s: changes of its images cannot be seen, so encode them again after one.", source.description
            )
        with first_host_first(f"the folder {workdir}"):
            _begin(store, tokenizer, params)
        mine = range(store.part_count)[jax.process_index() :: jax.process_count()]
        faults = store.faults(mine, whole=not is_remote(workdir))  # an object is written at once or not at all
        for part, fault in faults.items():
            if fault != "missing":
                logging.warning("%s, part %d: encoded again, because the file is %s.", workdir, part, fault)
        logging.info(
            "%s: %d images in %d parts, of which %d are to be encoded here.",
            source.description, len(source), store.part_count, len(faults),
        )  # fmt: skip
        with _all_hosts():
            fill(store, list(faults), options, options.train_split, tokenizer, params, _Progress(store, list(faults)))
    size = math.prod(store.shape) * store.dtype.itemsize
    logging.info("%s: complete, %s bytes of tokens. Train with --config.data_tokens=%s", workdir, f"{size:,}", workdir)
    return store


def check(config: ConfigDict, workdir: str) -> tuple[DataOptions, ImageTokenizer, PyTree]:
    """Rejects whatever can be rejected before the data set is opened, and creates `workdir`.

    Returns:
      The data set, and the image tokenizer with its parameters.

    Raises:
      ConfigError: an invalid value, no image tokenizer, or a `workdir` that cannot be written.
      CheckpointError: the image tokenizer is damaged, or lacks the checkpoint `tokenizer_step`.
    """
    given = {key: value for key, value in config.data.items() if value is not None}
    options = from_config(DataOptions, given, "data")
    options = dataclasses.replace(options, source=choose_source(options.source, options.path))
    place = config.tokenizer_workdir
    if not place or not has_tokenizer(place):
        raise ConfigError(
            f"config.tokenizer_workdir is {place!r}, where no image tokenizer is: give "
            "--config.tokenizer_workdir=DIR, the workdir of a training of configs/dvae.py or of a prior, or a folder "
            "that an importer of dalle_jax.pretrained wrote."
        )
    tokenizer, params = workdirs.load_tokenizer(place, config.tokenizer_step)
    if config.data.image_size is None:
        options = dataclasses.replace(options, image_size=tokenizer.image_size)
    tokenizer.grid(options.image_size)  # an error if the size does not fit
    check_writable(workdir)
    return options, tokenizer, params


def _begin(store: TokenStore, tokenizer: ImageTokenizer, params: PyTree) -> None:
    """Writes the description and the tokenizer, or compares them with those that are there."""
    if token_store.exists(store.folder):
        found = token_store.read_description(store.folder)
        if wrong := token_store.differences(found, store.description):
            raise ConfigError(
                f"{store.folder} holds the tokens of {' and of '.join(wrong)}. Give another --workdir, or delete it."
            )
    else:
        store.write_description()
    if not workdirs.has_tokenizer(store.folder):
        workdirs.save_tokenizer(store.folder, tokenizer, params)


@contextlib.contextmanager
def _all_hosts() -> Iterator[None]:
    """Ends the block together with the other hosts, because a first host that exits would end them.

    Ends the process if another host is lost.
    """
    if not joined():
        yield
        return
    with Watchdog(_LONGEST_SECONDS):
        yield
        host_values.put(f"encoded/{jax.process_index()}", True, overwrite=True)
        for host in range(jax.process_count()):
            host_values.wait_for(f"encoded/{host}", _LONGEST_SECONDS)


class _Progress:
    """Logs how many examples are encoded."""

    def __init__(self, store: TokenStore, parts: list[int]):
        self._store, self._total = store, sum(len(store.examples_of(part)) for part in parts)
        self._done, self._began, self._said = 0, time.perf_counter(), 0.0

    def __call__(self, part: int) -> None:
        """Counts a part that was written."""
        self._done += len(self._store.examples_of(part))
        elapsed = time.perf_counter() - self._began
        if elapsed - self._said >= _SECONDS or self._done == self._total:
            self._said = elapsed
            rate = self._done / max(elapsed, 1e-9)
            logging.info("%d of %d images are encoded (%.4g images/s)", self._done, self._total, rate)
