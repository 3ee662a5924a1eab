"""`TextToImage`: a trained prior, ready to draw.

    from dalle_jax import TextToImage
    model = TextToImage.load("runs/prior-shapes")
    images = model.generate("a red circle above a blue square", n=8, seed=0)     # uint8 [8, H, W, 3]

Image i of a (caption, seed) is the same whatever else is drawn in the same call.

    C captions    n candidates per caption    B = C·n rows    N = h·w image tokens    T text positions
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
from dalle_jax.text_to_image import best_of_n, editing
from dalle_jax.text_to_image.clip_scorer import ClipScorer, has_clip, parameter_count
from dalle_jax.text_to_image.sampling_parameters import by_name, parse
from dalle_jax.token_layout import TokenLayout


@dataclasses.dataclass(frozen=True)
class TextToImage:
    """A prior with its image tokenizer and its text model, ready to draw. Create one with `TextToImage.load`.

    Attributes:
      prior, params: the prior and its (averaged) parameters.
      tokenizer, tokenizer_params: the image tokenizer and its parameters.
      text_model: converts captions to ids.
      image_size: H = W, pixels.
      workdir, step: the workdir and the checkpoint's step that the prior was loaded from.
      rows_at_once: largest number of images drawn at once; bounds the memory.
      scorer: the CLIP that ranks candidates, or None.
      mesh: devices that share the rows, or None for the default device.
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
        """Loads a prior from its workdir.

        Args:
          workdir: workdir of a finished or running training of a prior, local or "gs://…".
          step: step of a checkpoint, "best", or None for the latest.
          rows_at_once: largest number of images drawn at once, over all devices.
          clip: folder of a CLIP, as for `ClipScorer.load`. None uses the CLIP frozen into `workdir`, if any.
          mesh: a mesh from `make_mesh`. Its axes `fsdp` and `tensor` split a prior that one device cannot hold. None
            uses all devices of this host along `data`.

        Returns:
          A model with `generate`, `best_of`, `complete`, `inpaint`, `outpaint` and `vary`.

        Raises:
          CheckpointError: no such workdir, checkpoint or CLIP, or parameters that do not fit the text model or the
            image tokenizer in the workdir.
          ConfigError: the workdir is not that of a prior.
          MeshError: the prior cannot be split over the mesh.
        """
        compilation_cache.enable()
        config = workdirs.read_config(workdir)
        if config.get("task") != "prior":
            raise ConfigError(
                f"{workdir} holds a training of task {config.get('task')!r}. Images are drawn from the workdir of a "
                "prior (python -m dalle_jax.main --config=configs/prior.py)."
            )
        tokenizer, tokenizer_params = workdirs.load_tokenizer(workdir)
        text_model = workdirs.load_text_model(workdir)
        size = config["data"]["image_size"]
        layout = TokenLayout(
            text_model.vocab_size, tokenizer.vocab_size, config["text"]["length"], *tokenizer.grid(size)
        )
        prior = make(config["prior"], config["model"], layout)
        mesh = mesh or local_mesh()
        with Checkpoints(workdir, best_metric="image_nats", read_only=True) as checkpoints:
            params = checkpoints.restore_params(step, layout=lambda stored: _layout(prior, stored, workdir, mesh))
            step = checkpoints.resolve(step)
        tokenizer_params = jax.device_put(tokenizer_params, replicated(mesh))
        folder = clip or (workdir if has_clip(workdir) else None)
        scorer = ClipScorer.load(folder, rows_at_once=rows_at_once, mesh=mesh) if folder else None
        return cls(
            prior, params, tokenizer, tokenizer_params, text_model, size, str(workdir), step, rows_at_once, scorer, mesh
        )

    def __repr__(self) -> str:
        layout = self.prior.layout
        return (
            f"TextToImage({self.prior.name} prior, {parameter_count(self.params)}, {self.image_size} x "
            f"{self.image_size} pixels as {layout.height} x {layout.width} tokens of {layout.image_vocab}, captions of "
            f"{layout.text_length} tokens of {layout.text_vocab}, workdir={self.workdir!r}, step={self.step}, "
            f"scorer={self.scorer!r})"
        )

    # -- images ---------------------------------------------------------------------------------------------------

    @by_name
    def generate(
        self,
        captions: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        candidates: int | None = None,
        keep: int | None = None,
        **sampling: Any,
    ) -> np.ndarray:
        """Draws images for one caption or for several.

        Args:
          captions: a caption, or a sequence of C captions.
          n: images per caption.
          seed: 0 or more. Image i of a caption depends only on (caption, seed, i).
          candidates: number of candidates to draw per caption. The ones that CLIP scores highest are returned, best
            first. `best_of` returns their scores too. None draws n images without CLIP.
          keep: number of candidates to return per caption. None returns n of them.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H, W, 3] for one caption, [C, n, H, W, 3] for a sequence. With `keep`, n is `keep`.

        Raises:
          DataError: an empty caption, or no caption.
          ConfigError: candidates without a CLIP, keep without candidates or larger than candidates, or a sampling
            parameter out of range.
        """
        one = isinstance(captions, str)
        if candidates is not None:
            images = self.best_of(captions, candidates, n if keep is None else keep, seed, **sampling).images
            return images[0] if one else images
        if keep is not None:
            raise ConfigError(f"keep is {keep}, but candidates is not set: give candidates, the number to choose from.")
        drawn = self.chunks([captions] if one else list(captions), n, seed, **sampling)
        rows = [
            np.concatenate([part for *_, part in parts], axis=1)
            for _, parts in itertools.groupby(drawn, operator.itemgetter(0))
        ]
        images = np.concatenate(rows)
        return images[0] if one else images

    @by_name
    def best_of(
        self, captions: str | Sequence[str], candidates: int, keep: int = 1, seed: int = 0, **sampling: Any
    ) -> best_of_n.Ranked:
        """Draws candidates for each caption and returns those that CLIP scores highest.

        At most `rows_at_once` images are drawn and scored at once. Only the best so far are held in memory.

        Args:
          captions: a caption, or a sequence of C captions.
          candidates: N, images to draw per caption: the first N images of `generate` with the same seed.
          keep: k, images to return per caption.
          seed: as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          `Ranked`: images uint8 [C, k, H, W, 3], scores float32 [C, k] and candidate numbers int [C, k], best first.
          C is 1 for a single caption.

        Raises:
          ConfigError: no CLIP was loaded, k is not in [1, N], or a sampling parameter is out of range.
          DataError: an empty caption, or no caption.
        """
        return best_of_n.best_of(self, captions, candidates, keep, seed, **sampling)

    @by_name
    def generate_one(
        self, captions: Sequence[str], n: int, i: int, j: int, seed: int = 0, **sampling: Any
    ) -> np.ndarray:
        """Draws the single image `generate(captions, n, seed, …)[i, j]`.

        The result is equal bit for bit on the same kind and number of devices, because the image is drawn in the same
        chunk of rows.

        Args:
          captions: sequence of C captions.
          n: images per caption in that call of `generate`.
          i: index of the caption, 0 to C - 1.
          j: index of the image, 0 to n - 1.
          seed: as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          uint8 [H, W, 3].

        Raises:
          ConfigError: no such caption or image, or a sampling parameter out of range.
          DataError: an empty caption, or no caption.
        """
        _check_count(n, seed)
        options, negative = parse(sampling)
        text = self.encode_text(captions)
        if not (0 <= i < len(text) and 0 <= j < n):
            raise ConfigError(f"Image {j} of caption {i}: expected 0 ≤ j < {n} and 0 ≤ i < {len(text)}.")
        many, candidates = self._chunk_shape(len(text), n)
        (c, row), (d, column) = divmod(i, many), divmod(j, candidates)
        return self._chunk(text, n, seed, options, negative, c * many, d * candidates)[row, column]

    @by_name
    def chunks(
        self, captions: Sequence[str], n: int, seed: int = 0, **sampling: Any
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Draws the images of `generate` chunk by chunk, so that at most `rows_at_once` are held in memory.

        Args:
          captions: sequence of C captions.
          n: images per caption.
          seed: as in `generate`.
          **sampling: the sampling parameters.

        Yields:
          The index of the chunk's first caption, the number of its first image per caption, and its images, uint8
          [captions, images, H, W, 3]. All images of a caption come before those of the next one.

        Raises:
          DataError: an empty caption, or no caption.
          ConfigError: a sampling parameter out of range.
        """
        _check_count(n, seed)
        options, negative = parse(sampling)
        text = self.encode_text(captions)
        many, candidates = self._chunk_shape(len(text), n)
        for c in range(0, len(text), many):
            for j in range(0, n, candidates):
                yield c, j, self._chunk(text, n, seed, options, negative, c, j)[: len(text) - c, : n - j]

    # -- edits ----------------------------------------------------------------------------------------------------

    @by_name
    def complete(
        self, image: np.ndarray, rows: int, caption: str, n: int = 1, seed: int = 0, **sampling: Any
    ) -> np.ndarray:
        """Keeps the top rows of the token grid and draws the rest. Works with every prior.

        Args:
          image: uint8 [H, W, 3].
          rows: token rows to keep, 0 to h. One row is H / h pixels high.
          caption: describes the whole image.
          n: images to draw.
          seed: as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H, W, 3]. The kept tokens and their pixels are unchanged.

        Raises:
          DataError: an empty caption, or an image of another size or type.
          ConfigError: rows outside [0, h], or a sampling parameter out of range.
        """
        return editing.complete(self, image, rows, caption, n, seed, **sampling)

    @by_name
    def inpaint(
        self,
        image: np.ndarray,
        mask: np.ndarray,
        caption: str,
        n: int = 1,
        seed: int = 0,
        dilate: int = 1,
        **sampling: Any,
    ) -> np.ndarray:
        """Draws the marked part of an image again, so that it fits the surroundings and the caption.

        Args:
          image: uint8 [H, W, 3].
          mask: bool [H, W] (or numbers, where 0 is False), True where to draw. A mask that is True everywhere keeps
            nothing of the image.
          caption: describes the whole image. Another caption than before changes the content of the marked part.
          n: images to draw.
          seed: as in `generate`.
          dilate: number of cells by which the marked cells grow, so that no token that saw the old content stays.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H, W, 3]. Outside the dilated cells, pixels and tokens are unchanged.

        Raises:
          ConfigError: the prior draws in raster order, so that it cannot see tokens after the hole; or `dilate` or a
            sampling parameter is out of range.
          DataError: an empty caption, an image or mask of another size, or a mask that marks nothing.
        """
        return editing.inpaint(self, image, mask, caption, n, seed, dilate, **sampling)

    @by_name
    def vary(
        self, image: np.ndarray, strength: float, caption: str, n: int = 1, seed: int = 0, **sampling: Any
    ) -> np.ndarray:
        """Draws a random share of the tokens again; the share is another one for each of the n images.

        Args:
          image: uint8 [H, W, 3].
          strength: share of the tokens to draw, in (0, 1]; 1 keeps nothing.
          caption: describes the whole image.
          n: images to draw.
          seed: as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H, W, 3]. Pixels more than one cell away from every new token are unchanged.

        Raises:
          ConfigError: strength outside (0, 1], a prior in raster order, or a sampling parameter out of range.
          DataError: an empty caption, or an image of another size or type.
        """
        return editing.vary(self, image, strength, caption, n, seed, **sampling)

    @by_name
    def outpaint(
        self,
        image: np.ndarray,
        pad: int | tuple[int, int, int, int],
        caption: str,
        n: int = 1,
        seed: int = 0,
        **sampling: Any,
    ) -> np.ndarray:
        """Extends the canvas around an image.

        Args:
          image: uint8 [H, W, 3].
          pad: pixels to add at the (top, bottom, left, right), or one number for all four sides. Each is a multiple of
            f = H / h, the pixels per cell.
          caption: describes the whole canvas.
          n: images to draw.
          seed: as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H + top + bottom, W + left + right, 3]. The given image stands in it unchanged.

        Raises:
          ConfigError: a pad that is negative, all zero or not a multiple of f, a prior in raster order, or a sampling
            parameter out of range.
          DataError: an empty caption, or an image of another size or type.
        """
        return editing.outpaint(self, image, pad, caption, n, seed, **sampling)

    # -- tokens ---------------------------------------------------------------------------------------------------

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Encodes captions to padded ids.

        Args:
          captions: sequence of C captions. Captions of more than T tokens are cut.

        Returns:
          int32 [C, T].

        Raises:
          DataError: an empty caption, or no caption.
        """
        layout = self.prior.layout
        rows = encode_captions(self.text_model, captions, layout.text_length)
        return np.stack([layout.pad_text(ids) for ids in rows])

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encodes images to tokens.

        Args:
          images: uint8 [B, H, W, 3].

        Returns:
          int32 [B, N], in raster order.

        Raises:
          DataError: images of another size or type.
        """
        images = np.asarray(images)
        expected = (self.image_size, self.image_size, 3)
        if images.shape[1:] != expected or images.dtype != np.uint8:
            raise DataError(
                f"The image is {images.dtype} {images.shape[1:]}; this model works on uint8 {expected}: resize it."
            )
        tokens = over_rows(self.mesh, functools.partial(_encode, self.tokenizer, self.tokenizer_params), images)
        return np.asarray(tokens).reshape(len(images), -1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Decodes tokens, int32 [B, N], to images, uint8 [B, H, W, 3]."""
        layout = self.prior.layout
        return self.decode_grid(tokens.reshape(-1, layout.height, layout.width))

    def decode_grid(self, tokens: np.ndarray) -> np.ndarray:
        """Decodes token grids of any size, int32 [B, h', w'], to images, uint8 [B, H', W', 3]."""
        decode = functools.partial(_decode, self.tokenizer, self.tokenizer_params)
        return to_uint8(over_rows(self.mesh, decode, tokens))

    @by_name
    def draw_tokens(
        self,
        caption: str,
        n: int,
        seed: int,
        known: tuple[np.ndarray, np.ndarray],
        window: int = 0,
        **sampling: Any,
    ) -> np.ndarray:
        """Draws the tokens of n images of one caption, given some of them.

        Args:
          caption: the caption.
          n: images to draw.
          seed: as in `generate`.
          known: tokens int32 [n, N] and mask bool [n, N]. Where the mask is True, the token is returned unchanged.
          window: number of the window on a canvas, which selects other random keys; 0 for a single image.
          **sampling: the sampling parameters.

        Returns:
          int32 [n, N].

        Raises:
          DataError: an empty caption.
          ConfigError: a sampling parameter out of range.
        """
        _check_count(n, seed)
        options, negative = parse(sampling)
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

    # -- chunks of one size: they bound the memory, compile once, and can be drawn again alone ----------------------

    def _chunk_shape(self, captions: int, n: int) -> tuple[int, int]:
        """Returns (captions, candidates per caption) of a chunk: a number of rows that the devices divide."""
        shards, candidates = batch_shards(self.mesh), min(n, self.rows_at_once)
        if candidates > shards:
            candidates = up_to_multiple(candidates, shards)
        many = max(1, min(self.rows_at_once // candidates, captions))
        return up_to_multiple(many, shards // math.gcd(shards, candidates)), candidates

    def _chunk(self, text, n, seed, options, negative, first_caption, first_candidate) -> np.ndarray:
        """Draws the chunk that starts there: uint8 [captions, candidates, H, W, 3]. Surplus rows repeat others."""
        captions, candidates = self._chunk_shape(len(text), n)
        some = np.resize(text[first_caption : first_caption + captions], (captions, text.shape[1]))
        numbers = np.tile(first_candidate + np.arange(candidates), captions)
        images = self.decode(self._sample(some, row_keys(seed, some, numbers), options, negative))
        return images.reshape(captions, candidates, *images.shape[1:])

    def _sample(self, text, keys, options: SamplingOptions, negative: str | None, known=None) -> jax.Array:
        """Samples image tokens, int32 [B, N]; see `TokenPrior.sample`."""
        away = None if negative is None else self.encode_text([negative])
        draw = lambda text, keys, known: self.prior.sample(
            self.params, text, keys, known=known, negative=away, **dataclasses.asdict(options)
        )
        return over_rows(self.mesh, draw, text, keys, known)


def _check_count(n: int, seed: int) -> None:
    if seed < 0 or n < 1:
        raise ConfigError(f"seed is {seed} and n is {n}; expected seed ≥ 0 and n ≥ 1.")


def _layout(prior: TokenPrior, stored: PyTree, workdir: str, mesh: Mesh) -> PyTree:
    """Returns the sharding of each parameter, after a check of their shapes.

    Raises:
      CheckpointError: parameters of other shapes than the text model, the image tokenizer and the configuration need.
    """
    expected = jax.eval_shape(prior.init, jax.random.key(0))
    wrong = first_mismatch(stored, nn.meta.unbox(expected))
    if wrong is not None:
        name, given, needed = wrong
        raise CheckpointError(
            f"{workdir}: the prior's parameter {name} is {given}, but its text model ({prior.layout.text_vocab} ids) "
            f"and image tokenizer ({prior.layout.image_vocab} codes) need {needed}: put back the text/ and "
            "image_tokenizer/ that it was trained with. An earlier version of dalle_jax may also have written it."
        )
    return shardings_of(expected, mesh)


def row_keys(seed: int, text: np.ndarray, numbers: np.ndarray, window: int = 0) -> jax.Array:
    """Returns the key of each candidate: a function of (seed, its caption, its number, the window) alone.

    The caption is part of the key, so that an unlucky draw is not shared by all captions. Otherwise metrics over many
    captions at one seed would vary as if there were only a few captions.

    Args:
      seed: the seed of the call.
      text: int32 [C, T], padded captions.
      numbers: ints [B], B a multiple of C: candidate numbers, grouped by caption.
      window: number of the window on a canvas.

    Returns:
      Keys [B].
    """
    key = keys.stream(jax.random.key(seed), "sample", window)
    captions = [zlib.crc32(np.asarray(row, np.int32).tobytes()) for row in text]
    pairs = np.repeat(np.uint32(captions), len(numbers) // len(text)), np.asarray(numbers, np.uint32)
    return jax.vmap(lambda caption, number: jax.random.fold_in(jax.random.fold_in(key, caption), number))(*pairs)


# Tokenizers with equal options are equal, so that they share one compiled program. They hold no parameters.


@functools.partial(jax.jit, static_argnums=0)
def _encode(tokenizer, params, images):
    return tokenizer.encode(params, images)


@functools.partial(jax.jit, static_argnums=0)
def _decode(tokenizer, params, tokens):
    return tokenizer.decode(params, tokens)
