"""`TextToImage`: a trained prior, ready to draw.

    from dalle_jax import TextToImage
    model = TextToImage.load("runs/prior-shapes")
    images = model.generate("a red circle above a blue square", n=8, seed=0)     # uint8 [8, H, W, 3]

Picture i of a seed is the same whatever else is drawn with it.

    C captions    n candidates of each    B = C·n rows    N image tokens
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from dalle_jax import compilation_cache, keys
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.data.text import TextModel, encode_captions
from dalle_jax.distributed.chunks import up_to_multiple
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.distributed.rows import over_rows
from dalle_jax.distributed.sharding import batch_shards, replicated, shardings_of
from dalle_jax.errors import CheckpointError, ConfigError, DataError
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.priors.registry import make
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree, first_mismatch
from dalle_jax.reporting.images import to_uint8
from dalle_jax.text_to_image.best_of_n import Reranking
from dalle_jax.text_to_image.clip_scorer import ClipScorer, has_clip
from dalle_jax.text_to_image.editing import Editing
from dalle_jax.token_layout import TokenLayout


@dataclasses.dataclass(frozen=True)
class TextToImage(Editing, Reranking):
    """A prior, its image tokenizer and its text model, ready to draw.

    Attributes:
      prior, params: the prior and its (averaged) parameters.
      tokenizer, tokenizer_params: the image tokenizer.
      text_model: captions to ids.
      image_size: H = W, pixels.
      workdir, step: where and from which checkpoint it was loaded.
      rows_at_once: most pictures drawn in one go, which bounds the memory.
      scorer: the CLIP that ranks candidates; None where there is none.
      mesh: of the devices that draw, each some of the rows; None: the default device.
    """

    prior: TokenPrior
    params: PyTree
    tokenizer: ImageTokenizer
    tokenizer_params: PyTree
    text_model: TextModel
    image_size: int
    workdir: str = ""
    step: int = 0
    rows_at_once: int = 64
    scorer: ClipScorer | None = None
    mesh: Mesh | None = None

    @classmethod
    def load(
        cls,
        workdir: str,
        step: int | str | None = None,
        rows_at_once: int = 64,
        clip: str | None = None,
        mesh: Mesh | None = None,
    ) -> TextToImage:
        """Reads a prior's workdir, local or "gs://…".

        Args:
          workdir: the directory of a finished or running training of a prior.
          step: a checkpoint's step, "best", or None for the latest.
          rows_at_once: most pictures drawn in one go, by all devices together.
          clip: what `ClipScorer.load` takes; None: the one frozen into `workdir`, if there is one.
          mesh: as from `make_mesh`, whose `fsdp` and `tensor` split a prior that one device cannot hold; None:
            all devices of this host along `data`.

        Raises:
          CheckpointError: where there is no such run, checkpoint or CLIP, or its parameters do not fit the text model
            or the image tokenizer beside them.
          ConfigError: where the run is not a prior's.
          MeshError: where the prior cannot be split over the mesh.
        """
        compilation_cache.enable()
        config = workdirs.read_config(workdir)
        if config.get("task") != "prior":
            raise ConfigError(
                f"{workdir} holds a training of task {config.get('task')!r}; pictures are generated from a prior's "
                "workdir (python -m dalle_jax.main --config=configs/prior.py)."
            )
        tokenizer, tokenizer_params = workdirs.load_tokenizer(workdir)
        text_model = workdirs.load_text_model(workdir)
        size = config["data"]["image_size"]
        layout = TokenLayout(
            text_model.vocab_size, tokenizer.vocab_size, config["text"]["length"], *tokenizer.grid(size)
        )
        prior = make(config["prior"], config["model"], layout)
        mesh = mesh or local_mesh()
        with Checkpoints(workdir, read_only=True) as checkpoints:
            params = checkpoints.restore_params(step, layout=lambda stored: _layout(prior, stored, workdir, mesh))
            step = checkpoints.resolve(step)
        tokenizer_params = jax.device_put(tokenizer_params, replicated(mesh))
        folder = clip or (workdir if has_clip(workdir) else None)
        scorer = ClipScorer.load(folder, rows_at_once=rows_at_once, mesh=mesh) if folder else None
        return cls(
            prior, params, tokenizer, tokenizer_params, text_model, size, str(workdir), step, rows_at_once, scorer, mesh
        )

    # -- pictures -------------------------------------------------------------------------------------------------

    def generate(
        self,
        captions: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        candidates: int | None = None,
        keep: int | None = None,
        **options,
    ) -> np.ndarray:
        """Draws pictures for one caption, or for several.

        Args:
          captions: a caption, or a sequence of C.
          n: pictures for each.
          seed: picture i of a caption depends on (caption, seed, i) alone.
          candidates: draw so many for each, and return those that the CLIP loaded beside the prior finds fittest, the
            best first (`best_of` gives their scores too).
          keep: how many of the candidates to return; None: n.
          **options: fields of `SamplingOptions`, and `negative`: a caption that guidance leads away from.

        Returns:
          uint8 [n, H, W, 3] for one caption, [C, n, H, W, 3] for a sequence; `keep` in the place of n where given.

        Raises:
          DataError: an empty caption.
          ConfigError: candidates without a CLIP; keep without candidates, or more than those.
        """
        one = isinstance(captions, str)
        if candidates is not None:
            images = self.best_of(captions, candidates, n if keep is None else keep, seed, **options).images
            return images[0] if one else images
        if keep is not None:
            raise ConfigError(f"keep is {keep}, of how many candidates? Give candidates too.")
        drawn = self.chunks([captions] if one else list(captions), n, seed, **options)
        rows = [
            np.concatenate([part for *_, part in parts], axis=1)
            for _, parts in itertools.groupby(drawn, operator.itemgetter(0))
        ]
        images = np.concatenate(rows)
        return images[0] if one else images

    def chunks(
        self, captions: Sequence[str], n: int, seed: int = 0, **options
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """What `generate` draws, piece by piece: at most `rows_at_once` pictures are held.

        Args:
          captions, n, seed, **options: as in `generate`.

        Yields:
          The first caption, the number of the first picture of each, and the pictures from there on, uint8
          [captions, pictures, H, W, 3]; all pictures of a caption before the next one's.
        """
        _check_count(n, seed)
        negative, options = _parse(options)
        text = self.encode_text(captions)
        many, candidates = self._chunk_shape(len(text), n)
        for c in range(0, len(text), many):
            for j in range(0, n, candidates):
                yield c, j, self._chunk(text, n, seed, options, negative, c, j)[: len(text) - c, : n - j]

    def picture(self, captions: Sequence[str], n: int, i: int, j: int, seed: int = 0, **options) -> np.ndarray:
        """`generate(captions, n, seed, **options)[i, j]` by itself: uint8 [H, W, 3].

        Bit for bit on as many devices of the same kind, because it is drawn among the same rows.

        Args:
          captions, n, seed, **options: as in `generate`.
          i, j: of the caption, and of its picture.

        Raises:
          ConfigError: there is no such caption or picture.
        """
        _check_count(n, seed)
        negative, options = _parse(options)
        text = self.encode_text(captions)
        if not (0 <= i < len(text) and 0 <= j < n):
            raise ConfigError(f"Picture {j} of caption {i}: expected 0 ≤ j < {n} and 0 ≤ i < {len(text)}.")
        many, candidates = self._chunk_shape(len(text), n)
        (c, row), (d, column) = divmod(i, many), divmod(j, candidates)
        return self._chunk(text, n, seed, options, negative, c * many, d * candidates)[row, column]

    # -- tokens ---------------------------------------------------------------------------------------------------

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Captions to padded ids, int32 [C, T]; captions longer than T tokens are cut.

        Raises:
          DataError: where there is no caption, or one is empty.
        """
        layout = self.prior.layout
        rows = encode_captions(self.text_model, captions, layout.text_length)
        return np.stack([layout.pad_text(ids) for ids in rows])

    def encode(self, images: np.ndarray) -> np.ndarray:
        """The tokens of pictures: uint8 [B, H, W, 3] to int32 [B, N].

        Raises:
          DataError: where they have another size or type.
        """
        images = np.asarray(images)
        expected = (self.image_size, self.image_size, 3)
        if images.shape[1:] != expected or images.dtype != np.uint8:
            raise DataError(
                f"The picture is {images.dtype} {images.shape[1:]}; this model works on uint8 {expected}: resize it."
            )
        tokens = over_rows(self.mesh, functools.partial(_encode, self.tokenizer, self.tokenizer_params), images)
        return np.asarray(tokens).reshape(len(images), -1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Tokens to pictures: int32 [B, N] to uint8 [B, H, W, 3]."""
        layout = self.prior.layout
        return self.decode_grid(tokens.reshape(-1, layout.height, layout.width))

    def decode_grid(self, tokens: np.ndarray) -> np.ndarray:
        """Token grids of any size to pictures: int32 [B, h', w'] to uint8 [B, H', W', 3]."""
        decode = functools.partial(_decode, self.tokenizer, self.tokenizer_params)
        return to_uint8(over_rows(self.mesh, decode, tokens))

    # -- in chunks of one size: bounded memory, one compilation, and a chunk can be drawn again by itself ----------

    def _chunk_shape(self, captions: int, n: int) -> tuple[int, int]:
        """(captions, candidates of each) drawn in one go: rows that the devices divide."""
        shards, candidates = batch_shards(self.mesh), min(n, self.rows_at_once)
        if candidates > shards:
            candidates = up_to_multiple(candidates, shards)
        many = max(1, min(self.rows_at_once // candidates, captions))
        return up_to_multiple(many, shards // math.gcd(shards, candidates)), candidates

    def _chunk(self, text, n, seed, options, negative, first_caption, first_candidate) -> np.ndarray:
        """The chunk that starts there: uint8 [captions, candidates, H, W, 3]. Surplus rows repeat others."""
        captions, candidates = self._chunk_shape(len(text), n)
        some = np.resize(text[first_caption : first_caption + captions], (captions, text.shape[1]))
        numbers = np.tile(first_candidate + np.arange(candidates), captions)
        images = self.decode(self._sample(some, row_keys(seed, some, numbers), options, negative))
        return images.reshape(captions, candidates, *images.shape[1:])

    def _sample(self, text, keys, options: SamplingOptions, negative: str | None, known=None) -> jax.Array:
        """int32 [B, N]."""
        away = None if negative is None else self.encode_text([negative])
        draw = lambda text, keys, known: self.prior.sample(
            self.params, text, keys, known=known, negative=away, **dataclasses.asdict(options)
        )
        return over_rows(self.mesh, draw, text, keys, known)

    def _draw(self, caption: str, n: int, seed: int, options, known, window: int = 0) -> np.ndarray:
        """Tokens of n pictures of one caption beside known ones, (int32 [n, N], bool [n, N]): int32 [n, N]."""
        _check_count(n, seed)
        negative, options = _parse(options)
        text = self.encode_text([caption])
        rows = up_to_multiple(min(n, self.rows_at_once), batch_shards(self.mesh))
        parts = []
        for first in range(0, n, rows):
            numbers = np.minimum(first + np.arange(rows), n - 1)  # surplus rows repeat the last
            given = tuple(x[numbers] for x in known)
            parts.append(
                np.asarray(self._sample(text, row_keys(seed, text, numbers, window), options, negative, given))
            )
        return np.concatenate(parts)[:n]


def _check_count(n: int, seed: int) -> None:
    if seed < 0 or n < 1:
        raise ConfigError(f"seed is {seed} and n is {n}; expected seed ≥ 0 and n ≥ 1.")


def _parse(options: dict[str, Any]) -> tuple[str | None, SamplingOptions]:
    """Keyword arguments of a drawing method: the negative caption, and the sampling options."""
    known = {field.name for field in dataclasses.fields(SamplingOptions)} | {"negative"}
    if unknown := sorted(set(options) - known):
        raise ConfigError(f"There is no sampling option {unknown[0]!r}; expected some of {', '.join(sorted(known))}.")
    options = dict(options)
    return options.pop("negative", None), SamplingOptions(**options)


def _layout(prior: TokenPrior, stored: PyTree, workdir: str, mesh: Mesh) -> PyTree:
    """Where each parameter goes; refuses those of another shape than the text model, the image tokenizer and the
    configuration ask for."""
    expected = jax.eval_shape(prior.init, jax.random.key(0))
    wrong = first_mismatch(stored, nn.meta.unbox(expected))
    if wrong is not None:
        name, given, asked = wrong
        raise CheckpointError(
            f"{workdir}: the prior's parameter {name} is {given}, but its text model ({prior.layout.text_vocab} ids) "
            f"and image tokenizer ({prior.layout.image_vocab} codes) ask for {asked}: put back the text/ and "
            "image_tokenizer/ that it was trained with. (Or an earlier version of dalle_jax wrote it.)"
        )
    return shardings_of(expected, mesh)


def row_keys(seed: int, text: np.ndarray, numbers: np.ndarray, window: int = 0) -> jax.Array:
    """The key of each candidate, [B]: a function of (seed, its caption, its number, the window of a canvas) alone.

    The caption is part of it, because an unlucky draw would else be every caption's: figures over many captions at one
    seed would vary as if there were a few of them.

    Args:
      seed: of the call.
      text: int32 [C, T], padded captions.
      numbers: ints [B], B a multiple of C: of the candidates, those of a caption side by side.
      window: which part of a canvas.
    """
    key = keys.stream(jax.random.key(seed), "sample", window)
    captions = [zlib.crc32(np.asarray(row, np.int32).tobytes()) for row in text]
    pairs = np.repeat(np.uint32(captions), len(numbers) // len(text)), np.asarray(numbers, np.uint32)
    return jax.vmap(lambda caption, number: jax.random.fold_in(jax.random.fold_in(key, caption), number))(*pairs)


@functools.partial(jax.jit, static_argnums=0)
def _encode(tokenizer, params, images):
    return tokenizer.encode(params, images)


@functools.partial(jax.jit, static_argnums=0)
def _decode(tokenizer, params, tokens):
    return tokenizer.decode(params, tokens)
