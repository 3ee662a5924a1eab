"""The condition of CLIP-GEN: CLIP's embedding of the image in training, and of a caption in drawing.

A prior therefore learns to draw captions from images without captions (CLIP-GEN, arXiv 2203.00386). The only position
before the image is a linear map of the unit vector. Unlike in the paper, training replaces a share of the vectors by
zeros, so that drawing can be guided.

    B rows    C captions    E embedding    D width
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, ArrayLike, Float, Key, UInt8
from ml_collections import ConfigDict

from dalle_jax.clip import stored
from dalle_jax.clip.encoder import ClipEncoder
from dalle_jax.configuration.values import finite
from dalle_jax.data.sources.source import Source
from dalle_jax.errors import ConfigError
from dalle_jax.priors.condition import Condition, NewTable, Tables, without_text


@dataclasses.dataclass(frozen=True)
class ClipEmbedding(Condition):
    """A unit vector of CLIP.

    Attributes:
      width: E.
      noise: length of a random vector that training adds to each unit vector (LAFITE, arXiv 2111.13792, section 3.1).
        Embeddings of captions lie a little off those of images; the prior then has seen such neighbours.
    """

    width: int
    noise: float = 0.0
    name: ClassVar[str] = "clip"
    length: ClassVar[int] = 1
    from_images: ClassVar[bool] = True
    own_keys: ClassVar[tuple[str, ...]] = ("clip_from", "clip_noise")

    @classmethod
    def complete(cls, config: ConfigDict) -> None:
        """See `Condition.complete`. The text model is that of the CLIP."""
        without_text(config)

    @classmethod
    def of_config(cls, config: Mapping[str, Any] | ConfigDict) -> ClipEmbedding:
        """See `Condition.of_config`."""
        if not config.get("clip_from"):
            raise ConfigError(
                "config.data.condition is 'clip', and config.clip_from is not set: give the workdir or folder of a "
                "CLIP, such as --config.clip_from=runs/clip-shapes (configs/clip.py trains one)."
            )
        return cls(ClipEncoder.load(config["clip_from"]).width, _noise(config))

    @classmethod
    def prepare(
        cls, config: Mapping[str, Any] | ConfigDict, source: Source, workdir: epath.PathLike
    ) -> tuple[ClipEmbedding, ClipEncoder]:
        """See `Condition.prepare`. Freezes the CLIP of `config.clip_from` into the workdir."""
        del source
        if not stored.has_clip(workdir):
            stored.save(workdir, stored.load(config["clip_from"]))
        return cls.load(config, workdir)

    @classmethod
    def load(cls, config: Mapping[str, Any] | ConfigDict, workdir: epath.PathLike) -> tuple[ClipEmbedding, ClipEncoder]:
        """See `Condition.load`."""
        encoder = ClipEncoder.load(workdir)
        return cls(encoder.width, _noise(config)), encoder

    def empty(self) -> Float[np.ndarray, " E"]:
        """See `Condition.empty`: zeros, which no unit vector is."""
        return np.zeros(self.width, np.float32)

    def of_images(self, images: UInt8[ArrayLike, "B H W 3"], model: ClipEncoder) -> Float[np.ndarray, "B E"]:
        """See `Condition.of_images`."""
        return model.image_features(images)

    def vary(self, key: Key[Array, ""], rows: Float[ArrayLike, "B E"]) -> Float[ArrayLike, "B E"]:
        """See `Condition.vary`: adds noise, and scales the sum to a unit vector."""
        if not self.noise:
            return rows
        noisy = rows + self.noise * _unit(jax.random.normal(key, rows.shape))
        return _unit(noisy)

    def encode(self, requests: Sequence[str], model: ClipEncoder) -> Float[np.ndarray, "C E"]:
        """See `Condition.encode`: embeddings of captions."""
        return model.text_features(requests)

    def tables(self, new: NewTable) -> Tables:
        """See `Condition.tables`: the linear map."""
        return (new("clip_kernel", self.width),)

    def embed(self, tables: Tables, rows: Float[ArrayLike, "B E"]) -> Float[ArrayLike, "B T D"]:
        """See `Condition.embed`."""
        return (rows @ tables[0])[:, None]


def _noise(config: Mapping[str, Any] | ConfigDict) -> float:
    """Returns `config.clip_noise`, checked. Earlier configurations have none."""
    return finite("config.clip_noise", config.get("clip_noise", 0.0), 0.0, 10.0)


def _unit(rows: Float[ArrayLike, "B E"]) -> Float[Array, "B E"]:
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
