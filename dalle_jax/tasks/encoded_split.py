"""Image tokens of a whole split: encoded once, and cached in a file."""

from __future__ import annotations

import functools
import hashlib
import io
import json
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
from dalle_jax.storage.files import write_atomically


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

    A source whose examples may change has no identity. Its tokens are never stored.

    Args:
      options: the data set.
      split: name of the split.
      tokenizer: the image tokenizer.
      params: its parameters.
      folders: folders that may hold the file; a new file is written to the first one.

    Returns:
      Tokens, int32 [examples, N].
    """
    identity = open_source(options, split).identity
    if identity is None:
        return encode_split(options, split, tokenizer, params)
    what = [identity, options.image_size, options.image_key, tokenizers.to_dict(tokenizer)]
    if options.fit != "crop":  # left out otherwise, so that earlier files stay valid
        what.append(options.fit)
    digest = hashlib.sha256(json.dumps([*what, fingerprint(params)]).encode())
    paths = [epath.Path(folder).expanduser() / f"tokens-{digest.hexdigest()[:16]}.npy" for folder in folders]
    with first_host_first(f"the tokens {paths[0]}"):
        found = next((path for path in paths if path.exists()), None)
        if found:
            return np.load(io.BytesIO(found.read_bytes()))
        logging.info("Encoding the images of the split %s once (data_tokens=once)", split)
        tokens = encode_split(options, split, tokenizer, params)
        written = io.BytesIO()
        np.save(written, tokens)
        write_atomically(paths[0], written.getvalue())
    return tokens
