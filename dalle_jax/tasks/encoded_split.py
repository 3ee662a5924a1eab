"""Image tokens of a whole split: encoded once, and stored as a column of the data (`data/token_store.py`).

h, w grid of tokens    N = h·w tokens of an image    n examples
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

from dalle_jax.data import token_store
from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions, Source
from dalle_jax.data.token_store import PART, Description, TokensInMemory, TokenStore
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.distributed.rows import over_rows
from dalle_jax.distributed.sharding import replicated
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.pytree import PyTree, fingerprint

BATCH = 64  # images that are encoded together; divides `PART`
_FULLY_CHECKED = 2**30  # bytes of tokens that a training checks at its start; of more only sizes and last lines


@functools.partial(jax.jit, static_argnums=0)
def _encode(tokenizer: ImageTokenizer, params: PyTree, images: jax.Array) -> jax.Array:
    """Encodes uint8 images [B, H, W, 3] to int32 tokens [B, h, w]."""
    return tokenizer.encode(params, images)


def describe(options: DataOptions, source: Source, tokenizer: ImageTokenizer, params: PyTree) -> Description:
    """Describes the tokens of a split.

    Args:
      options: the data set.
      source: the open split.
      tokenizer: the image tokenizer.
      params: its parameters.
    """
    return Description(
        images=None if source.image_identity is None else _hash(source.image_identity),
        image_size=options.image_size,
        image_key=options.image_key,
        fit=options.fit,
        examples=len(source),
        tokens=math.prod(tokenizer.grid(options.image_size)),
        vocab_size=tokenizer.vocab_size,
        part=PART,
        **_of_tokenizer(tokenizer, params),
    )


def _of_tokenizer(tokenizer: ImageTokenizer, params: PyTree) -> dict[str, str]:
    return {"tokenizer": _hash(json.dumps(tokenizers.to_dict(tokenizer))), "parameters": fingerprint(params)}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# Tokens of a part [m, N], and its unreadable examples.
_Encoded = tuple[np.ndarray, dict[int, tuple[str, str, str]]]


def encode_parts(
    options: DataOptions, split: str, tokenizer: ImageTokenizer, params: PyTree, parts: Sequence[int]
) -> Iterator[tuple[int, _Encoded]]:
    """Encodes parts of a split, on all devices of this host.

    Args:
      options: the data set.
      split: name of the split.
      tokenizer: the image tokenizer.
      params: its parameters.
      parts: numbers of the parts, see `token_store.PART`.

    Yields:
      (part, (tokens, unreadable)): int32 [m, N] in the order of the source, and why examples have no image, by index.
      Their rows are zero.
    """
    if not parts:
        return
    mesh = local_mesh() if jax.local_device_count() > 1 else None
    if mesh is not None:
        params = jax.device_put(params, replicated(mesh))
    pipeline = Pipeline(options, split=split, train=False, batch_size=BATCH)
    each = PART // BATCH
    numbers = [number for part in parts for number in range(part * each, min((part + 1) * each, len(pipeline)))]
    with pipeline.chosen_batches(numbers) as batches:
        for part in parts:
            examples = range(part * PART, min((part + 1) * PART, len(pipeline.source)))
            rows, unreadable = None, {}
            for _ in range(0, len(examples), BATCH):
                batch = next(batches)
                tokens = np.asarray(over_rows(mesh, functools.partial(_encode, tokenizer, params), batch["image"]))
                if rows is None:
                    rows = np.zeros((len(examples), tokens[0].size), np.int32)
                places = batch["index"][batch["valid"]] - examples.start
                rows[places] = tokens.reshape(BATCH, -1)[batch["valid"]]
                unreadable |= {note.index: (note.reason, note.name, note.detail) for note in batches.notes}
            yield part, (rows, unreadable)


def fill(
    store: TokenStore,
    parts: Sequence[int],
    options: DataOptions,
    split: str,
    tokenizer: ImageTokenizer,
    params: PyTree,
    written: Callable[[int], None] = lambda part: None,
) -> None:
    """Encodes parts of a split and writes each of them.

    Args:
      store: the tokens.
      parts: numbers of the parts.
      options, split, tokenizer, params: see `encode_parts`.
      written: called after each part, with its number.
    """
    with contextlib.closing(encode_parts(options, split, tokenizer, params, parts)) as encoded:
        for part, (tokens, unreadable) in encoded:
            store.write(part, tokens, unreadable)
            written(part)


def tokens_of_split(
    options: DataOptions, split: str, tokenizer: ImageTokenizer, params: PyTree, folders: Sequence[epath.PathLike]
) -> TokenStore | TokensInMemory:
    """Returns the tokens of a split. Those that are missing or damaged are encoded and stored.

    A source whose images may change without notice has no `image_identity`. Its tokens are never stored.

    Args:
      options: the data set.
      split: name of the split.
      tokenizer: the image tokenizer.
      params: its parameters.
      folders: folders that may hold the folder of the tokens, `tokens-….`. A new one is written into the first.
    """
    source = open_source(options, split)
    description = describe(options, source, tokenizer, params)
    if description.images is None:
        return _in_memory(options, split, tokenizer, params, description)
    name = f"tokens-{description.key}"
    stores = [TokenStore(epath.Path(folder).expanduser() / name, description) for folder in folders]
    with first_host_first(f"the tokens {stores[0].folder}"):
        for store in stores:
            if token_store.exists(store.folder) and not store.faults():
                return store
        store, faults = stores[0], stores[0].faults()
        for part, fault in faults.items():
            if fault != "missing":
                logging.warning("%s, part %d: encoded again, because the file is %s.", store.folder, part, fault)
        logging.info("Encoding the images of the split %s once (data_tokens=once)", split)
        store.write_description()
        fill(store, list(faults), options, split, tokenizer, params)
    return store


def _in_memory(
    options: DataOptions, split: str, tokenizer: ImageTokenizer, params: PyTree, description: Description
) -> TokensInMemory:
    tokens, unreadable = np.zeros((description.examples, description.tokens), description.dtype), {}
    parts = range(-(-description.examples // PART))
    for part, (rows, failed) in encode_parts(options, split, tokenizer, params, parts):
        tokens[part * PART : part * PART + len(rows)] = rows
        unreadable |= failed
    return TokensInMemory(tokens, unreadable)


def given_tokens(
    folder: epath.PathLike, options: DataOptions, split: str, tokenizer: ImageTokenizer, params: PyTree
) -> TokenStore:
    """Opens tokens that the job of configs/encode.py wrote (`config.data_tokens=DIR`).

    Args:
      folder: its workdir.
      options, split: the images that the training reads.
      tokenizer, params: the image tokenizer of the training.

    Raises:
      ConfigError: the tokens are those of other images or of another tokenizer, or some are missing or damaged.
    """
    found = token_store.read_description(folder)
    _check_same(folder, found, describe(options, open_source(options, split), tokenizer, params))
    store = TokenStore(folder, found)
    whole = math.prod(store.shape) * store.dtype.itemsize <= _FULLY_CHECKED
    if faults := store.faults(whole=whole):
        part, fault = next(iter(faults.items()))
        raise ConfigError(
            f"config.data_tokens={str(folder)!r}: {len(faults)} of {store.part_count} parts cannot be used. Part "
            f"{part} is {fault}. Run the command that encoded them again: --config=configs/encode.py "
            f"--workdir={folder}. It encodes these parts only."
        )
    return store


def check_tokenizer(folder: epath.PathLike, tokenizer: ImageTokenizer, params: PyTree) -> None:
    """Raises a `ConfigError` if the tokens in a folder are those of another image tokenizer."""
    found = token_store.read_description(folder)
    _check_same(folder, found, dataclasses.replace(found, **_of_tokenizer(tokenizer, params)))


def _check_same(folder: epath.PathLike, found: Description, expected: Description) -> None:
    if wrong := token_store.differences(found, expected):
        raise ConfigError(
            f"config.data_tokens={str(folder)!r} holds the tokens of {' and of '.join(wrong)}. Encode the images of "
            "this training into another folder with configs/encode.py, or give --config.data_tokens=once."
        )
