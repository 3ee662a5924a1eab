"""The condition of Muse's second stage: a caption and the image tokens of a smaller image (arXiv 2301.00704, 2.5).

A prior of this condition enlarges images. Training reads one data set: each image gives its own tokens, and those of a
smaller copy as the condition. Drawing takes images of any other prior, or photographs. An encoder reads caption and
tokens together, and the image tokens read the encoder (`encoder.py`). In Muse captions are encoded apart, by T5-XXL,
and its low-resolution tokens by another transformer.

    B rows    T text positions    n tokens of a smaller image    s its height and width in pixels    H, W image size
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, UInt8
from ml_collections import ConfigDict

from dalle_jax.checkpoints import frozen
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.values import natural
from dalle_jax.data.augment import augment
from dalle_jax.data.sources.source import Source
from dalle_jax.data.text import CaptionModel
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.priors.condition import KEY, Condition, NewTable, Tables, Text
from dalle_jax.priors.embedding import rotated
from dalle_jax.pytree import PyTree
from dalle_jax.storage.files import expanded

FOLDER = "low_resolution"  # of the frozen image tokenizer, in a workdir
_AT_ONCE = 64  # images


@dataclasses.dataclass(frozen=True)
class SmallerImages:
    """Reads captions, and encodes smaller copies of images.

    Attributes:
      captions: converts captions to ids.
      tokenizer, params: the image tokenizer of the smaller images, and its parameters.
      size: s.
    """

    captions: CaptionModel
    tokenizer: ImageTokenizer
    params: PyTree
    size: int

    def tokens(self, images: UInt8[ArrayLike, "B H W 3"]) -> Int[np.ndarray, "B n"]:
        """Encodes images, after an area resize to s pixels: uint8 [B, H, W, 3], H = W, to int32 [B, n]."""
        small = np.stack([augment(np.asarray(image), self.size, "none", None) for image in images])
        parts = []
        for start in range(0, len(small), _AT_ONCE):
            part = small[start : start + _AT_ONCE]
            whole = np.concatenate([part, np.repeat(part[-1:], _AT_ONCE - len(part), axis=0)])  # one program
            parts.append(np.asarray(_encode(self.tokenizer, self.params, whole))[: len(part)])
        return np.concatenate(parts).reshape(len(small), -1)


@functools.partial(jax.jit, static_argnums=0)
def _encode(tokenizer: ImageTokenizer, params: PyTree, images: ArrayLike) -> Array:
    return tokenizer.encode(params, images)


@dataclasses.dataclass(frozen=True)
class LowResolution(Condition):
    """A caption, then the tokens of a smaller image. A row is int32 [T + n].

    Attributes:
      text: the caption.
      vocab: number of codes of the smaller images. The id after them stands for no token.
      height, width: grid of the n tokens.
    """

    text: Text
    vocab: int
    height: int
    width: int
    name: ClassVar[str] = "low_resolution"
    from_images: ClassVar[bool] = True
    reads_requests: ClassVar[bool] = False
    own_keys: ClassVar[tuple[str, ...]] = ("low_from", "low_size")
    own_modules: ClassVar[tuple[str, ...]] = (FOLDER,)
    read, train = staticmethod(Text.read), staticmethod(Text.train)  # of the model of captions

    @property
    def cells(self) -> int:
        """n, the number of tokens of a smaller image."""
        return self.height * self.width

    @property
    def grid(self) -> tuple[int, int]:
        """See `Condition`."""
        return self.height, self.width

    @property
    def length(self) -> int:
        """See `Condition`: T + n."""
        return self.text.length + self.cells

    @property
    def captions(self) -> Text:
        """See `Condition`."""
        return self.text

    @classmethod
    def complete(cls, config: ConfigDict) -> None:
        """See `Condition.complete`. `config.low_size` is half of the image size by default."""
        if config.low_size is None:
            config.low_size = config.data.image_size // 2
        size = natural("config.low_size", config.low_size, 1, config.data.image_size)
        if config.data.augment != "none":
            raise ConfigError(
                f"config.data.augment is {config.data.augment!r}, and config.data.condition 'low_resolution': each "
                f"image and its copy of {size} pixels must show the same. Set --config.data.augment=none."
            )

    @classmethod
    def of_config(cls, config: Mapping[str, Any] | ConfigDict) -> LowResolution:
        """See `Condition.of_config`."""
        if not config.get("low_from"):
            raise ConfigError(
                "config.data.condition is 'low_resolution', and config.low_from is not set: give the workdir of the "
                "prior, or of the image tokenizer, whose images are to be enlarged, such as "
                "--config.low_from=runs/maskgit-small."
            )
        tokenizer, _ = workdirs.load_tokenizer(config["low_from"])
        return cls._of(Text.of_config(config), tokenizer, config["low_size"])

    @classmethod
    def _of(cls, text: Text, tokenizer: ImageTokenizer, size: int) -> LowResolution:
        try:
            return cls(text, tokenizer.vocab_size, *tokenizer.grid(size))
        except ValueError as error:
            raise ConfigError(f"config.low_size is {size}, which does not fit config.low_from: {error}") from error

    @classmethod
    def prepare(
        cls, config: Mapping[str, Any] | ConfigDict, source: Source, workdir: epath.PathLike
    ) -> tuple[LowResolution, SmallerImages]:
        """See `Condition.prepare`. Freezes the image tokenizer of `config.low_from` into the workdir."""
        Text.prepare(config, source, workdir)
        if not frozen.exists(expanded(workdir) / FOLDER):
            tokenizer, params = workdirs.load_tokenizer(config["low_from"])
            cls._of(Text.of_config(config), tokenizer, config["low_size"])
            frozen.save(expanded(workdir) / FOLDER, tokenizers.to_dict(tokenizer), params)
        return cls.load(config, workdir)

    @classmethod
    def load(
        cls, config: Mapping[str, Any] | ConfigDict, workdir: epath.PathLike
    ) -> tuple[LowResolution, SmallerImages]:
        """See `Condition.load`."""
        text, captions = Text.load(config, workdir)
        folder = expanded(workdir) / FOLDER
        options, params = frozen.load(folder, "Delete it: the training then freezes its tokenizer there again.")
        tokenizer = tokenizers.from_dict(options)
        return cls._of(text, tokenizer, config["low_size"]), SmallerImages(
            captions, tokenizer, params, config["low_size"]
        )

    def caption_model(self, model: SmallerImages | None) -> CaptionModel | None:
        """See `Condition.caption_model`."""
        return None if model is None else model.captions

    def empty(self) -> Int[np.ndarray, " positions"]:
        """See `Condition.empty`: no words and no tokens."""
        return np.concatenate([self.text.empty(), np.full(self.cells, self.vocab, np.int32)])

    def of_batch(self, batch: Mapping[str, Any]) -> Int[ArrayLike, "B positions"]:
        """See `Condition.of_batch`: the captions of the batch, and the tokens of `of_images`."""
        return jnp.concatenate([jnp.asarray(batch["text"]), jnp.asarray(batch[KEY])[:, self.text.length :]], axis=1)

    def of_images(self, images: UInt8[ArrayLike, "B H W 3"], model: SmallerImages) -> Int[np.ndarray, "B positions"]:
        """See `Condition.of_images`. The captions of these rows are empty."""
        tokens = model.tokens(images)
        return np.concatenate([np.tile(self.text.empty(), (len(tokens), 1)), tokens], axis=1)

    def with_captions(
        self, rows: Int[ArrayLike, "B positions"], captions: Sequence[str], model: SmallerImages
    ) -> Int[np.ndarray, "B positions"]:
        """Returns rows of `of_images` with a caption for each."""
        return np.concatenate([self.text.encode(captions, model.captions), np.asarray(rows)[:, self.text.length :]], 1)

    def encode(self, requests: Sequence[str], model: SmallerImages | None) -> Int[np.ndarray, "C positions"]:
        """See `Condition.encode`. A caption alone is no condition, so that this always raises a `DataError`."""
        del model
        raise DataError(
            f"This prior enlarges images, and {len(requests)} captions were given without any. In Python, call "
            "upsample(images, captions). On the command line, draw with another prior and give this one as "
            "--config.upsampler=DIR."
        )

    def decode(self, row: Int[ArrayLike, " positions"], model: SmallerImages | None) -> str:
        """See `Condition.decode`: the caption."""
        return self.text.decode(row[: self.text.length], self.caption_model(model))

    def start(self, tables: PyTree, model: SmallerImages | None, key: Key[Array, ""]) -> PyTree:
        """See `Condition.start`: similar codes of the smaller images start with similar embeddings."""
        if model is None:
            return tables
        table = tables["low_resolution"].unbox()
        vectors = rotated(model.tokenizer.codebook(model.params), table, key)
        return {**tables, "low_resolution": tables["low_resolution"].replace_boxed(table.at[: self.vocab].set(vectors))}

    def tables(self, new: NewTable) -> Tables:
        """See `Condition.tables`: those of captions, and one row for each code and for no token."""
        return (*self.text.tables(new), new("low_resolution", self.vocab + 1))

    def embed(self, tables: Tables, rows: Int[ArrayLike, "B positions"]) -> Float[ArrayLike, "B positions D"]:
        """See `Condition.embed`."""
        words, tokens = jnp.split(jnp.asarray(rows), [self.text.length], axis=1)
        return jnp.concatenate([self.text.embed(tables[:1], words), tables[1][tokens]], axis=1)

    def padding(self, rows: Int[ArrayLike, "B positions"]) -> Bool[ArrayLike, "B positions"]:
        """See `Condition.padding`: that of captions. Positions of tokens hold none."""
        words, tokens = jnp.split(jnp.asarray(rows), [self.text.length], axis=1)
        return jnp.concatenate([self.text.padding(words), jnp.zeros(tokens.shape, bool)], axis=1)
