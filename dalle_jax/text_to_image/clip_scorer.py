"""Scores images against captions with a CLIP: one that was trained here, or imported weights.

    from dalle_jax import ClipScorer
    scorer = ClipScorer.load("runs/clip-shapes")
    scores = scorer.score(images, captions)     # float32 [B], cosines: higher is better

`save` freezes a scorer into any folder, such as the workdir of a prior; `clip/stored.py` says what it writes.

    B images    C captions    T text positions    E embedding
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dalle_jax.checkpoints.folders import check_mesh, check_path, check_step
from dalle_jax.clip import stored
from dalle_jax.clip.encoder import encode_images, encode_texts, ids_of
from dalle_jax.configuration.values import natural
from dalle_jax.data.byte_pairs import BytePairs
from dalle_jax.data.text import CaptionModel
from dalle_jax.distributed.chunks import in_chunks
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.distributed.sharding import replicated
from dalle_jax.errors import DataError
from dalle_jax.models.clip import CLIP
from dalle_jax.pytree import PyTree, fingerprint
from dalle_jax.text_to_image import inputs
from dalle_jax.text_to_image.drawing import MOST_IMAGES


@dataclasses.dataclass(frozen=True)
class ClipScorer:
    """A CLIP with its text model, ready to score images. Create one with `ClipScorer.load`.

    Attributes:
      clip, params: the model and its parameters.
      text_model: converts captions to ids.
      rows_at_once: images or captions that pass through a tower at once; bounds the memory.
      mesh: devices that share these rows, each with the whole model, or None for the default device.
    """

    clip: CLIP
    params: PyTree
    text_model: CaptionModel | BytePairs
    rows_at_once: int = 64
    mesh: Mesh | None = None

    @classmethod
    def load(
        cls,
        folder: str | epath.PathLike,
        step: int | str | None = None,
        rows_at_once: int = 64,
        mesh: Mesh | None = None,
    ) -> ClipScorer:
        """Loads a CLIP from a folder, local or "gs://…".

        Args:
          folder: a folder that `save`, an importer of `dalle_jax.pretrained` or an export wrote, the workdir of a
            training, or the export of a hub, "hf://owner/name".
          step: step of a checkpoint in a workdir, "best", or None for the latest.
          rows_at_once: images or captions that pass through a tower at once.
          mesh: devices that share these rows. None uses all devices of this host.

        Returns:
          The scorer, with its parameters on the devices.

        Raises:
          CheckpointError: no CLIP in the folder, or parameters that do not fit its text model.
          DamagedError: a file changed since it was written.
          DataError: the text model is missing, or not a text model.
        """
        step, rows_at_once = check_step(step), natural("rows_at_once", rows_at_once, 1, MOST_IMAGES)
        check_mesh(mesh)
        check_path("clip", folder)
        clip, params, text_model = stored.load(folder, step)
        mesh = mesh or local_mesh()
        return cls(clip, jax.device_put(params, replicated(mesh)), text_model, rows_at_once, mesh)

    def save(self, folder: str | epath.PathLike, dtype: str | None = None) -> None:
        """Freezes the CLIP into `<folder>/clip`, where `load` finds it.

        Args:
          folder: the folder, local or "gs://…". A CLIP that is already there is replaced.
          dtype: None for the format of workdirs. "float32" or "bfloat16" for safetensors, see `exported.rounded`.

        Raises:
          UserError: the folder cannot be written.
        """
        check_path("folder", folder)
        stored.save(folder, stored.StoredClip(self.clip, self.params, self.text_model), dtype)

    def __repr__(self) -> str:
        options = self.clip.options
        return (
            f"ClipScorer({parameter_count(self.params)}, {options.image_size} x {options.image_size} pixels, captions "
            f"of {options.text_length} tokens of {options.text_vocab}, embedding of {options.embed_dim})"
        )

    # -- scores ---------------------------------------------------------------------------------------------------

    def score(self, images: np.ndarray | Sequence[Any], captions: str | Sequence[str]) -> np.ndarray:
        """Scores each image against its caption.

        Args:
          images: B images of any size, see `image_features`.
          captions: B captions, or a string: one caption for all images. Repeated captions are encoded once.

        Returns:
          float32 [B], cosines in [-1, 1]; higher is better.

        Raises:
          DataError: different numbers of images and captions, something else than images, or an empty caption.
        """
        pixels, texts = inputs.pixels_of_each(images), inputs.captions(captions)
        if isinstance(captions, str):
            texts *= len(pixels)
        if len(pixels) != len(texts):
            raise DataError(f"{len(pixels)} images and {len(texts)} captions: expected one caption per image.")
        places = {caption: i for i, caption in enumerate(dict.fromkeys(texts))}
        features = self.text_features(list(places))[[places[caption] for caption in texts]]
        return np.sum(self.image_features(pixels) * features, axis=1)

    def image_features(self, images: np.ndarray | Sequence[Any]) -> np.ndarray:
        """Encodes images to unit vectors.

        Args:
          images: a batch [B, …], a list of B images, or one image. An image is a path, a PIL image, or an array
            [H, W, 3], [3, H, W], RGBA or grey, of whole numbers in [0, 255] or of floats in [0, 1]. Images of any size
            are resized as the CLIP needs. Each new size compiles a program.

        Returns:
          float32 [B, E].

        Raises:
          DataError: something else.
        """
        pixels = inputs.pixels_of_each(images)
        features = np.zeros((len(pixels), self.clip.options.embed_dim), np.float32)
        sizes = [image.shape for image in pixels]
        for size in dict.fromkeys(sizes):
            places = [i for i, other in enumerate(sizes) if other == size]
            features[places] = self._in_chunks(encode_images, np.stack([pixels[i] for i in places]))
        return features

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Encodes a batch on the devices: uint8 [B, H, W, 3] to unit vectors, float32 [B, E]."""
        return encode_images(self.clip, self.params, images)

    def text_features(self, captions: Sequence[str]) -> np.ndarray:
        """Encodes captions to unit vectors.

        Args:
          captions: C captions, or a string: one caption.

        Returns:
          float32 [C, E].

        Raises:
          DataError: no caption, or an empty one.
        """
        return self._in_chunks(encode_texts, self.encode_text(captions))

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Encodes captions to ids.

        Args:
          captions: C captions. They are cut to T - 1 tokens; the end token fills the rest of each row.

        Returns:
          int32 [C, T].

        Raises:
          DataError: no caption, or an empty one.
        """
        return ids_of(self.clip, self.text_model, inputs.captions(captions))

    def fingerprint(self) -> str:
        """Hashes the parameters: 16 hexadecimal digits that differ between different CLIPs."""
        return fingerprint(self.params)

    def _in_chunks(self, encode: Callable[..., jax.Array], rows: np.ndarray) -> np.ndarray:
        return in_chunks(functools.partial(encode, self.clip, self.params), rows, self.rows_at_once, self.mesh)


def parameter_count(params: PyTree) -> str:
    """Counts the numbers in a tree of arrays, for people: "1,234,567 parameters"."""
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters"
