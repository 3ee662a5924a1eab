"""Encodes images and captions with a stored CLIP, for models that are built on its embeddings.

B images    C captions    H, W image    T text positions    E embedding
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from dalle_jax.clip import stored
from dalle_jax.clip.stored import StoredClip
from dalle_jax.data.byte_pairs import BytePairs
from dalle_jax.data.text import CaptionModel, encode_captions
from dalle_jax.models.clip import CLIP
from dalle_jax.pytree import PyTree


@dataclasses.dataclass(frozen=True)
class ClipEncoder:
    """A CLIP with its text model.

    Attributes:
      stored: the CLIP.
    """

    stored: StoredClip

    @classmethod
    def load(cls, folder: str | os.PathLike) -> ClipEncoder:
        """Loads the CLIP of a folder, see `stored.load`."""
        return cls(stored.load(folder))

    @property
    def width(self) -> int:
        """E."""
        return self.stored.clip.options.embed_dim

    @property
    def params(self) -> PyTree:
        """The parameters of the CLIP."""
        return self.stored.params

    def image_features(self, images: UInt8[ArrayLike, "B H W 3"]) -> Float[np.ndarray, "B E"]:
        """Encodes images of one size to unit vectors, float32."""
        return np.asarray(encode_images(self.stored.clip, self.stored.params, images))

    def text_features(self, captions: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Encodes captions to unit vectors, float32.

        Raises:
          DataError: no caption, or an empty one.
        """
        clip, params, text_model = self.stored
        return np.asarray(encode_texts(clip, params, ids_of(clip, text_model, captions)))

    def unknown_letters(self, text: str) -> str:
        """Returns the different letters of a caption that the text model lacks."""
        return self.stored.text_model.unknown_letters(text)


def ids_of(clip: CLIP, text_model: CaptionModel | BytePairs, captions: Sequence[str]) -> Int[np.ndarray, "C T"]:
    """Encodes captions to ids. They are cut to T - 1 tokens; the end token fills the rest of each row.

    Raises:
      DataError: no caption, or an empty one.
    """
    options = clip.options
    encoded = encode_captions(text_model, captions, options.text_length - 1)
    rows = np.full((len(captions), options.text_length), options.end_id, np.int32)
    for row, ids in zip(rows, encoded):
        row[: len(ids)] = ids
    return rows


@functools.partial(jax.jit, static_argnums=0)
def encode_images(clip: CLIP, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]) -> Float[Array, "B E"]:
    """Encodes images to unit vectors on the devices."""
    return clip.encode_image(params, images)


@functools.partial(jax.jit, static_argnums=0)
def encode_texts(clip: CLIP, params: PyTree, text: Int[ArrayLike, "C T"]) -> Float[Array, "C E"]:
    """Encodes the ids of captions to unit vectors on the devices."""
    return clip.encode_text(params, text)
