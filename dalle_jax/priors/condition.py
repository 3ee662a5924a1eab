"""Conditions: what a prior draws an image from, such as a caption, a class, or nothing.

A condition is one class. It says how many positions it has before the image, what it reads of a batch, what its empty
form is, how it is embedded, whether it is predicted as well, and how a user's requests become it. The priors, the
training and `TextToImage` ask it, and know no kind of condition by name.

To add one, write a subclass of `Condition`, add it to `CONDITIONS` in `registry.py`, and give a variant of a config
file `data=dict(condition=NAME)`.

    B rows    C requests    T positions    D width    W classes of a head
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Shaped, UInt8
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.data import text_models
from dalle_jax.data.labels import Labels
from dalle_jax.data.sources.source import Source
from dalle_jax.data.text import CaptionModel, TextModel, encode_captions
from dalle_jax.errors import DataError
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import PaddedIds

KEY = "condition"  # of conditions that are computed from images, in a batch
MOST_CLASSES = 1000  # of a configuration that sets no number
Tables = tuple[Float[ArrayLike, "_ D"], ...]
# Creates a parameter, given its name and its number of rows. See `StreamEmbedding.table`.
NewTable = Callable[[str, int], Float[ArrayLike, "_ D"]]


class Condition(abc.ABC):
    """The part of a prior's stream before the image. It is immutable and hashable, and holds sizes alone.

    Attributes:
      name: its name in configurations.
      length: T, number of positions. It is at least 1, because the first image token is predicted from a position.
      captions: the ids of captions that a batch holds under "text", or None if the condition reads no captions.
      from_images: whether a batch holds rows of `of_images` under `KEY`.
      reads_requests: whether `encode` reads captions or names of classes. A prior that only enlarges images does not.
      own_keys: keys of a training configuration that no other condition has.
      own_modules: folders of frozen modules in a workdir that no other condition has; an export copies them.
      grid: height and width of the image cells that the last positions stand for; None if they stand for none.
    """

    name: ClassVar[str]
    length: int
    captions: PaddedIds | None = None
    from_images: ClassVar[bool] = False
    reads_requests: ClassVar[bool] = True
    own_keys: ClassVar[tuple[str, ...]] = ()
    own_modules: ClassVar[tuple[str, ...]] = ()
    grid: tuple[int, int] | None = None

    # -- a training and its workdir -------------------------------------------------------------------------------

    @classmethod
    @abc.abstractmethod
    def complete(cls, config: ConfigDict) -> None:
        """Fixes the keys of a training configuration that this condition decides, such as sizes in `config.text`."""

    @classmethod
    @abc.abstractmethod
    def of_config(cls, config: Mapping[str, Any] | ConfigDict) -> Condition:
        """Returns the condition of a training configuration, with the largest sizes that it allows."""

    @classmethod
    @abc.abstractmethod
    def prepare(
        cls, config: Mapping[str, Any] | ConfigDict, source: Source, workdir: epath.PathLike
    ) -> tuple[Condition, Any]:
        """Writes into a new workdir whatever `encode` needs, and returns the same as `load`.

        Args:
          config: the training configuration.
          source: the training split. Its captions are read only if they are needed.
          workdir: directory of the run.
        """

    @classmethod
    @abc.abstractmethod
    def load(cls, config: Mapping[str, Any] | ConfigDict, workdir: epath.PathLike) -> tuple[Condition, Any]:
        """Returns the condition of a workdir, and the model that reads requests, or None if it needs none."""

    # -- rows -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def empty(self) -> Shaped[np.ndarray, "*row"]:
        """Returns the empty condition, one row. Guidance and dropped conditions use it."""

    def of_batch(self, batch: Mapping[str, Any]) -> Shaped[ArrayLike, "B ..."]:
        """Returns the conditions of a batch."""
        return batch[KEY]

    def of_images(self, images: UInt8[ArrayLike, "B H W 3"], model: Any) -> Shaped[np.ndarray, "B ..."]:
        """Computes the conditions of images. Arguments as in `encode`."""
        raise NotImplementedError(f"{type(self).__name__} is not computed from images.")

    def vary(self, key: Key[Array, ""], rows: Shaped[ArrayLike, "B ..."]) -> Shaped[ArrayLike, "B ..."]:
        """Changes the conditions of a training batch at random. Most kinds stay as they are."""
        del key
        return rows

    @abc.abstractmethod
    def encode(self, requests: Sequence[str], model: Any) -> Shaped[np.ndarray, "C ..."]:
        """Converts a user's requests to conditions.

        Args:
          requests: captions, or names of classes.
          model: the model that `load` returned.

        Raises:
          DataError: no request, or one that the condition cannot express.
        """

    def caption_model(self, model: Any) -> CaptionModel | None:
        """Returns the model of captions that `load`'s model is or has; None without captions."""
        return model if self.captions else None

    def decode(self, row: Shaped[ArrayLike, "*row"], model: Any) -> str:
        """Returns one row as a request; "" if there are no words for it or without a model."""
        del row, model
        return ""

    # -- the model ------------------------------------------------------------------------------------------------

    def start(self, tables: PyTree, model: Any, key: Key[Array, ""]) -> PyTree:
        """Changes the initial parameters of the embedding, with what the model of `prepare` knows.

        Args:
          tables: boxed parameters of the embedding, by name. Those of `tables` are among them.
          model: the model that `prepare` returned, or None.
          key: scalar key.
        """
        del model, key
        return tables

    @abc.abstractmethod
    def tables(self, new: NewTable) -> Tables:
        """Creates the parameters of `embed`."""

    @abc.abstractmethod
    def embed(self, tables: Tables, rows: Shaped[ArrayLike, "B ..."]) -> Float[ArrayLike, "B T D"]:
        """Embeds conditions without positions: [B, ...] to float32 [B, T, D]."""

    def padding(self, rows: Shaped[ArrayLike, "B ..."]) -> Bool[ArrayLike, "B T"] | None:
        """Returns which positions of conditions hold no more than padding; None for a kind without padding."""
        del rows
        return None

    def classes(self, *, with_padding: bool) -> int:
        """Returns W, the number of classes of the head that predicts the condition; 0 if it is not predicted.

        Args:
          with_padding: whether each padding id is a class. Otherwise all of them share one.
        """
        del with_padding
        return 0

    def targets(self, rows: Shaped[ArrayLike, "B _"], *, with_padding: bool) -> Int[ArrayLike, "B _"]:
        """Converts some positions of conditions to classes of the head, int32 in [0, W)."""
        raise NotImplementedError(f"{type(self).__name__} is not predicted.")


@dataclasses.dataclass(frozen=True)
class Text(PaddedIds, Condition):
    """Captions, as ids of a text model with padding. The autoregressive prior predicts them, too.

    Attributes:
      vocab, length: see `PaddedIds`.
    """

    name: ClassVar[str] = "text"

    @property
    def captions(self) -> PaddedIds:
        """See `Condition`."""
        return self

    @classmethod
    def complete(cls, config: ConfigDict) -> None:
        """See `Condition.complete`. The configuration or the data set decide all sizes of captions."""

    @classmethod
    def read(cls, path: str | epath.PathLike) -> CaptionModel:
        """Reads the file `config.text.path`."""
        return text_models.load(path)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> CaptionModel:
        """Makes the model of captions with at most `vocab_size` ids; raises a `ConfigError` if these are too few."""
        return TextModel.train(captions, vocab_size)

    @classmethod
    def of_config(cls, config: Mapping[str, Any] | ConfigDict) -> Text:
        """See `Condition.of_config`."""
        return cls(config["text"]["vocab_size"], config["text"]["length"])

    @classmethod
    def prepare(
        cls, config: Mapping[str, Any] | ConfigDict, source: Source, workdir: epath.PathLike
    ) -> tuple[Text, CaptionModel]:
        """See `Condition.prepare`. Trains the model of captions, or copies that of `config.text.path`."""
        model = workdirs.ensure_text_model(config["text"], source.captions(), workdir, cls.read, cls.train)
        return cls(model.vocab_size, config["text"]["length"]), model

    @classmethod
    def load(cls, config: Mapping[str, Any] | ConfigDict, workdir: epath.PathLike) -> tuple[Text, CaptionModel]:
        """See `Condition.load`."""
        model = workdirs.load_text_model(workdir)
        return cls(model.vocab_size, config["text"]["length"]), model

    def of_batch(self, batch: Mapping[str, Any]) -> Int[ArrayLike, "B T"]:
        """See `Condition.of_batch`: padded ids, int32 [B, T]."""
        return batch["text"]

    def encode(self, requests: Sequence[str], model: CaptionModel | None) -> Int[np.ndarray, "C T"]:
        """See `Condition.encode`. Captions of more than T ids are cut."""
        return np.stack([self.pad(ids) for ids in encode_captions(model, requests, self.length)])

    def decode(self, row: Int[ArrayLike, " T"], model: CaptionModel | None) -> str:
        """See `Condition.decode`."""
        return "" if model is None else model.decode(self.given(row))

    def tables(self, new: NewTable) -> Tables:
        """See `Condition.tables`: one row for each id and for each padding."""
        return (new("text", self.ids),)

    def embed(self, tables: Tables, rows: Int[ArrayLike, "B T"]) -> Float[ArrayLike, "B T D"]:
        """See `Condition.embed`."""
        return tables[0][rows]

    def padding(self, rows: Int[ArrayLike, "B T"]) -> Bool[ArrayLike, "B T"]:
        """See `Condition.padding`."""
        return rows >= self.vocab


@dataclasses.dataclass(frozen=True)
class Label(Text):
    """A class, as one id of `Labels`. It is not predicted, so that the loss is that of the image alone.

    Its parameters are those of a caption of one token, as in imported class-conditional priors.

    Attributes:
      vocab: number of classes.
      length: 1.
    """

    name: ClassVar[str] = "label"
    length: int = 1

    @classmethod
    def complete(cls, config: ConfigDict) -> None:
        """See `Condition.complete`. `config.text.vocab_size` is the largest number of classes."""
        config.text.length = cls.length
        if config.text.vocab_size is None:
            config.text.vocab_size = MOST_CLASSES

    @classmethod
    def read(cls, path: str | epath.PathLike) -> CaptionModel:
        """Reads the file `config.text.path`, which has the names of a class in each line."""
        return Labels.load(path)

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> CaptionModel:
        """Makes each different caption a class; raises a `ConfigError` if there are more than `vocab_size`."""
        return Labels.of_captions(captions, vocab_size)

    def classes(self, *, with_padding: bool) -> int:
        """See `Condition.classes`."""
        del with_padding
        return 0


@dataclasses.dataclass(frozen=True)
class Nothing(Condition):
    """No condition. The one position of an unconditional prior is a start-of-sequence vector, as in iGPT.

    A row has no values. Requests are words that are not read. They only name images, so that the same word draws the
    same images.
    """

    name: ClassVar[str] = "none"
    length: ClassVar[int] = 1

    @classmethod
    def complete(cls, config: ConfigDict) -> None:
        """See `Condition.complete`. There is no text, and nothing to drop for guidance."""
        without_text(config)
        config.model.caption_drop = 0.0

    @classmethod
    def of_config(cls, config: Mapping[str, Any] | ConfigDict) -> Nothing:
        """See `Condition.of_config`."""
        del config
        return cls()

    @classmethod
    def prepare(
        cls, config: Mapping[str, Any] | ConfigDict, source: Source, workdir: epath.PathLike
    ) -> tuple[Nothing, None]:
        """See `Condition.prepare`."""
        del source
        return cls.load(config, workdir)

    @classmethod
    def load(cls, config: Mapping[str, Any] | ConfigDict, workdir: epath.PathLike) -> tuple[Nothing, None]:
        """See `Condition.load`."""
        del config, workdir
        return cls(), None

    def empty(self) -> Int[np.ndarray, " 0"]:
        """See `Condition.empty`."""
        return np.zeros(0, np.int32)

    def of_batch(self, batch: Mapping[str, Any]) -> Int[ArrayLike, "B 0"]:
        """See `Condition.of_batch`."""
        return batch["index"][:, None][:, :0]

    def encode(self, requests: Sequence[str], model: CaptionModel | None) -> Int[np.ndarray, "C 0"]:
        """See `Condition.encode`."""
        del model
        if not requests:
            raise DataError("No request was given; expected at least one, which may be any word.")
        return np.zeros((len(requests), 0), np.int32)

    def tables(self, new: NewTable) -> Tables:
        """See `Condition.tables`."""
        return (new("start_of_sequence", 1),)

    def embed(self, tables: Tables, rows: Int[ArrayLike, "B 0"]) -> Float[ArrayLike, "B T D"]:
        """See `Condition.embed`."""
        return jnp.broadcast_to(tables[0][None], (len(rows), *tables[0].shape))


def without_text(config: ConfigDict) -> None:
    """Removes the section `text` of a configuration, if it has one."""
    if "text" in config:
        with config.unlocked():
            del config["text"]


def blank(condition: Condition) -> Shaped[Array, "1 ..."]:
    """Returns one row of zeros with the shape and dtype of a condition, for shapes of parameters."""
    return jnp.zeros_like(condition.empty())[None]


def with_empty(
    condition: Condition, rows: Shaped[ArrayLike, "B ..."], empty: Bool[ArrayLike, " B"]
) -> Shaped[Array, "B ..."]:
    """Replaces the rows of `empty` by the empty condition."""
    return jnp.where(empty.reshape(-1, *[1] * (rows.ndim - 1)), jnp.asarray(condition.empty())[None], rows)
