"""Image tokens of a whole split: encoded once, and cached in a file."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.distributed.turns import first_host_first
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.pytree import PyTree, fingerprint
from dalle_jax.storage import json_files
from dalle_jax.storage.checksummed import checksum
from dalle_jax.storage.files import write_atomically, write_errors


@functools.partial(jax.jit, static_argnums=0)
def _encode(tokenizer: ImageTokenizer, params: PyTree, images: jax.Array) -> jax.Array:
    """Encodes uint8 images [B, H, W, 3] to int32 tokens [B, h, w]."""
    return tokenizer.encode(params, images)


def encode_split(
    options: DataOptions, split: str, tokenizer: ImageTokenizer, params: PyTree, batch_size: int = 64
) -> np.ndarray:
    """Encodes all images of a split.

    Args:
      options: the data set.
      split: name of the split.
      tokenizer: the image tokenizer.
      params: its parameters.
      batch_size: number of images that are encoded together.

    Returns:
      Tokens, int32 [examples, N], in the order of the source. Rows of unreadable examples are zero.
    """
    pipeline = Pipeline(options, split=split, train=False, batch_size=batch_size)
    rows = None
    for batch in pipeline:
        tokens = np.asarray(_encode(tokenizer, params, batch["image"])).reshape(batch_size, -1)
        if rows is None:
            rows = np.zeros((len(pipeline.source), tokens.shape[1]), np.int32)
        rows[batch["index"][batch["valid"]]] = tokens[batch["valid"]]
    return rows


def tokens_of_split(
    options: DataOptions, split: str, tokenizer: ImageTokenizer, params: PyTree, folders: Sequence[epath.PathLike]
) -> np.ndarray:
    """Returns the tokens of `encode_split`, from a file if one exists.

    A source whose examples may change has no identity. Its tokens are never stored. A damaged file is reported and
    written again.

    Args:
      options: the data set.
      split: name of the split.
      tokenizer: the image tokenizer.
      params: its parameters.
      folders: folders that may hold the file; a new file is written to the first one.

    Returns:
      Tokens, int32 [examples, N].
    """
    source = open_source(options, split)
    identity, shape = source.identity, (len(source), math.prod(tokenizer.grid(options.image_size)))
    if identity is None:
        return encode_split(options, split, tokenizer, params)
    what = [identity, options.image_size, options.image_key, tokenizers.to_dict(tokenizer)]
    if options.fit != "crop":  # left out otherwise, so that earlier files stay valid
        what.append(options.fit)
    key = hashlib.sha256(json.dumps([*what, fingerprint(params)]).encode()).hexdigest()
    paths = [epath.Path(folder).expanduser() / f"tokens-{key[:16]}.npy" for folder in folders]
    with first_host_first(f"the tokens {paths[0]}"):
        for path in paths:
            if path.exists():
                try:
                    return _unpacked(path.read_bytes(), key, shape, tokenizer.vocab_size)
                except (OSError, ValueError) as error:
                    logging.warning("The stored tokens %s are not used, because the file is damaged: %s.", path, error)
        logging.info("Encoding the images of the split %s once (data_tokens=once)", split)
        tokens = encode_split(options, split, tokenizer, params)
        with write_errors(paths[0]):
            write_atomically(paths[0], _packed(tokens, key))
    return tokens


def _packed(tokens: np.ndarray, key: str) -> bytes:
    """Returns the content of a cache: a file of `np.save`, and a last line with the key and the checksum."""
    array = io.BytesIO()
    np.save(array, tokens)
    last = json.dumps({"key": key, "sha256": checksum(array.getvalue())})
    return array.getvalue() + f"\n{last}\n".encode()


def _unpacked(content: bytes, key: str, shape: tuple[int, int], vocab_size: int) -> np.ndarray:
    """Returns the tokens of a cache, int32 [examples, N] in [0, vocab_size).

    Raises:
      ValueError: the cache is damaged, belongs to another key, or was written before caches had checksums.
    """
    array, _, last = content.removesuffix(b"\n").rpartition(b"\n")
    if not last.startswith(b'{"key"'):
        raise ValueError("it has no checksum")
    if json_files.parse(last) != {"key": key, "sha256": checksum(array)}:
        raise ValueError("it changed since it was written")
    tokens = np.load(io.BytesIO(array))
    if tokens.dtype != np.int32 or tokens.shape != shape:
        raise ValueError(f"it holds {tokens.dtype} {list(tokens.shape)}; expected int32 {list(shape)}")
    if not ((tokens >= 0) & (tokens < vocab_size)).all():
        raise ValueError(f"it holds tokens outside of [0, {vocab_size})")
    return tokens
