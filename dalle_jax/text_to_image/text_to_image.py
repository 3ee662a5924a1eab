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
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jax.sharding import Mesh

from dalle_jax.configuration.values import natural, shown
from dalle_jax.data.text import CaptionModel
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree, fingerprint
from dalle_jax.text_to_image import best_of_n, drawing, inputs, loading, upsampling
from dalle_jax.text_to_image import output as outputs
from dalle_jax.text_to_image.clip_scorer import ClipScorer, parameter_count
from dalle_jax.text_to_image.editing import Edits
from dalle_jax.text_to_image.output import Images
from dalle_jax.text_to_image.sampling_parameters import by_name, parse


@dataclasses.dataclass(frozen=True)
class TextToImage(Edits):
    """A prior with its image tokenizer and its text model, ready to draw. Create one with `TextToImage.load`.

    Attributes:
      prior, params: the prior and its (averaged) parameters. `load` converts those of a bfloat16 prior once, see
        `priors.decoding_weights`.
      tokenizer, tokenizer_params: the image tokenizer and its parameters.
      text_model: converts captions to ids; None for a condition without any, such as that of an unconditional prior.
      image_size: H = W, pixels.
      workdir, step: the workdir and the checkpoint's step that the prior was loaded from.
      rows_at_once: largest number of images drawn at once; bounds the memory.
      scorer: the CLIP that ranks candidates, or None.
      mesh: devices that share the rows, or None for the default device.
      fit: how a given image that is not square becomes one, `data.fit` of the training.
      stored_fingerprint: hash of the checkpoint's parameters if `load` converted them, else "".
      weights: "int8" if `load` rounded the kernels, else None.
      on_frame: called with a `drawing.Frame` after each decoding step, or row of tokens, of all images that are drawn.
        An exception that it raises stops the drawing. The results are the same as with None. Set it by
        `dataclasses.replace(model, on_frame=…)`.
    """

    prior: TokenPrior
    params: PyTree
    tokenizer: ImageTokenizer
    tokenizer_params: PyTree
    text_model: CaptionModel | None
    image_size: int
    workdir: str = ""
    step: int = 0
    rows_at_once: int = 64
    scorer: ClipScorer | None = None
    mesh: Mesh | None = None
    fit: str = "crop"
    stored_fingerprint: str = ""
    weights: str | None = None
    on_frame: Callable[[drawing.Frame], None] | None = None

    @classmethod
    def load(
        cls,
        workdir: str,
        step: int | str | None = None,
        rows_at_once: int = 64,
        clip: str | None = None,
        mesh: Mesh | None = None,
        base: str | None = None,
        weights: str | None = None,
    ) -> TextToImage:
        """Loads a prior from its workdir.

        Args:
          workdir: workdir of a finished or running training of a prior, or an exported folder, local or "gs://…". Or an
            export on a hub, "hf://owner/name" or "hf://owner/name@revision".
          step: step of a checkpoint, "best", or None for the latest.
          rows_at_once: largest number of images drawn at once, over all devices.
          clip: folder of a CLIP, as for `ClipScorer.load`. None uses the CLIP frozen into `workdir`, if any.
          mesh: a mesh from `make_mesh`. Its axes `fsdp` and `tensor` split a prior that one device cannot hold. None
            uses all devices of this host along `data`.
          base: of exported adapters (LoRA), the workdir or export that they were trained from. None for the one that
            the export names, and for whole models.
          weights: "int8" keeps the kernels of the prior's trunk in one byte per number, which changes the images a
            little; see `priors.decoding_weights`. None keeps the precision of the prior.

        Returns:
          A model with `generate`, `best_of`, `complete`, `inpaint`, `outpaint` and `vary`. A prior that enlarges images
          has `upsample` alone.

        Raises:
          CheckpointError: no such workdir, checkpoint or CLIP, or parameters that do not fit the text model or the
            image tokenizer in the workdir. For a folder around several workdirs, the message lists them.
          ConfigError: the workdir is not that of a prior, `step` or `rows_at_once` is no such number, or unknown
            `weights`.
          MeshError: the prior cannot be split over the mesh.
          HubError: an export on a hub cannot be downloaded.
        """
        return cls(**loading.load(workdir, step, rows_at_once, clip, mesh, base, weights))

    def __repr__(self) -> str:
        layout = self.prior.layout
        return (
            f"TextToImage({self.prior.name} prior, {parameter_count(self.params)}, {self.image_size} x "
            f"{self.image_size} pixels as {layout.height} x {layout.width} tokens of {layout.image_vocab}, given "
            f"{layout.condition!r}, workdir={self.workdir!r}, step={self.step}, "
            f"scorer={self.scorer!r})"
        )

    def fingerprint(self) -> str:
        """Hashes the prior's parameters as they are in the checkpoint: 16 hexadecimal digits."""
        return self.stored_fingerprint or fingerprint(self.params)

    # -- images ---------------------------------------------------------------------------------------------------

    @by_name
    def generate(
        self,
        captions: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        candidates: int | None = None,
        keep: int | None = None,
        output: str = "numpy",
        stream: bool = False,
        progress: bool | None = None,
        **sampling: Any,
    ) -> Images | Iterator[np.ndarray | PIL.Image.Image]:
        """Draws images for one caption or for several.

        Args:
          captions: a caption, or a sequence of C captions.
          n: images per caption.
          seed: 0 to 4294967295. Image i of a caption depends only on (caption, seed, i).
          candidates: number of candidates to draw per caption. The ones that CLIP scores highest are returned, best
            first. `best_of` returns their scores too. None draws n images without CLIP.
          keep: number of candidates to return per caption. None returns n of them.
          output: "numpy" for arrays, "pil" for lists of PIL images.
          stream: return an iterator that draws up to `rows_at_once` images at a time and gives them one by one,
            [H, W, 3] each: all images of a caption, then those of the next one. Not with candidates.
          progress: show a progress bar. None shows it on a terminal and in a notebook if several chunks are drawn.
          **sampling: the sampling parameters.

        Returns:
          uint8 [n, H, W, 3] for one caption, [C, n, H, W, 3] for a sequence. With `keep`, n is `keep`.

        Raises:
          DataError: an empty caption, no caption, or something else than strings.
          ConfigError: candidates without a CLIP, keep without candidates or larger than candidates, or a parameter out
            of range.
        """
        outputs.check(output, stream, progress, candidates)
        one, captions = isinstance(captions, str), inputs.captions(captions)
        n, seed = drawing.check_count(n, seed)
        if candidates is not None:
            if keep is None and n > natural("candidates", candidates, 1, drawing.MOST_IMAGES):
                raise ConfigError(
                    f"n is {n}, but candidates is {candidates}: CLIP keeps n of the candidates. Give candidates={n} or "
                    "more, or a smaller n."
                )
            ranked = self.best_of(captions, candidates, n if keep is None else keep, seed, progress, **sampling)
            return outputs.converted(ranked.images[0] if one else ranked.images, output)
        if keep is not None:
            raise ConfigError(
                f"keep is {shown(keep)}, but candidates is not set: give candidates, the number to choose from."
            )
        drawn = self.chunks(captions, n, seed, **sampling)
        drawn = outputs.with_bar(drawn, len(captions) * n, self.rows_at_once, progress)
        if stream:
            return outputs.one_by_one(drawn, output)
        rows = [
            np.concatenate([part for *_, part in parts], axis=1)
            for _, parts in itertools.groupby(drawn, operator.itemgetter(0))
        ]
        images = np.concatenate(rows)
        return outputs.converted(images[0] if one else images, output)

    @by_name
    def best_of(
        self,
        captions: str | Sequence[str],
        candidates: int,
        keep: int = 1,
        seed: int = 0,
        progress: bool | None = None,
        **sampling: Any,
    ) -> best_of_n.Ranked:
        """Draws candidates for each caption and returns those that CLIP scores highest.

        At most `rows_at_once` images are drawn and scored at once. Only the best so far are held in memory.

        Args:
          captions: a caption, or a sequence of C captions.
          candidates: N, images to draw per caption: the first N images of `generate` with the same seed.
          keep: k, images to return per caption.
          seed: as in `generate`.
          progress: as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          `Ranked`: images uint8 [C, k, H, W, 3], scores float32 [C, k] and candidate numbers int [C, k], best first.
          C is 1 for a single caption.

        Raises:
          ConfigError: no CLIP was loaded, k is not in [1, N], or a sampling parameter is out of range.
          DataError: an empty caption, no caption, or something else than strings.
        """
        outputs.check_progress(progress)
        return best_of_n.best_of(self, captions, candidates, keep, seed, progress, **sampling)

    @by_name
    def upsample(
        self,
        images: Any,
        captions: str | Sequence[str] | None = None,
        seed: int = 0,
        output: str = "numpy",
        **sampling: Any,
    ) -> Images:
        """Enlarges images, with a prior of `configs/maskgit.py:upsample`.

        Args:
          images: images of any size, see `encode`: a batch [B, …], a list of B images, or one image. They are resized
            to the size of the smaller images of the training.
          captions: one caption for all images, or a sequence of B captions. None stands for the empty caption.
          seed: as in `generate`. A result depends only on (image, caption, seed).
          output: "numpy" or "pil", as in `generate`.
          **sampling: the sampling parameters.

        Returns:
          uint8 [B, H, W, 3].

        Raises:
          ConfigError: another kind of prior, a negative caption, or a sampling parameter out of range.
          DataError: no images, an empty caption, or another number of captions than images.
        """
        outputs.check_output(output)
        return outputs.converted(upsampling.upsample(self, images, captions, seed, sampling), output)

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
          DataError: an empty caption, no caption, or something else than strings.
        """
        n, seed = drawing.check_count(n, seed)
        options, negative = parse(sampling)
        text = self.encode_text(captions)
        natural("i, the index of the caption,", i, most=len(text) - 1)
        natural("j, the index of the image,", j, most=n - 1)
        part = next(part for part in drawing.chunks(self, len(text), n) if part.holds(i, j))
        return drawing.draw(self, text, part, seed, options, negative)[i - part.caption, j - part.candidate]

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

        Returns:
          An iterator over tuples: the index of the chunk's first caption, the number of its first image per caption,
          and its images, uint8 [captions, images, H, W, 3]. All images of a caption come before those of the next one.

        Raises:
          DataError: an empty caption, no caption, or something else than strings.
          ConfigError: a sampling parameter out of range.
        """
        n, seed = drawing.check_count(n, seed)
        options, negative = parse(sampling)
        self.prior.check_sampling(options)
        text = self.encode_text(captions)
        return (
            (part.caption, part.candidate, drawing.draw(self, text, part, seed, options, negative))
            for part in drawing.chunks(self, len(text), n)
        )

    # -- tokens ---------------------------------------------------------------------------------------------------

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Encodes captions to conditions of the prior.

        Args:
          captions: sequence of C captions. Captions of more than T tokens are cut.

        Returns:
          [C, ...]; padded ids, int32 [C, T], of a prior of captions.

        Raises:
          DataError: an empty caption, no caption, or something else than strings.
        """
        return self.prior.layout.condition.encode(inputs.captions(captions), self.text_model)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Encodes images to tokens.

        Args:
          images: a batch [B, …], a list of B images, or one image. An image is a path, a PIL image, or an array
            [H, W, 3], [3, H, W], RGBA or grey, of whole numbers in [0, 255] or of floats in [0, 1]. Transparent parts
            become white. An image of another size is cropped and resized as in training.

        Returns:
          int32 [B, N], in raster order.

        Raises:
          DataError: something else.
        """
        images = inputs.images(images, self.image_size, self.fit)
        encode = functools.partial(drawing.encode, self.tokenizer, self.tokenizer_params)
        return drawing.by_rows(self, encode, images).reshape(len(images), -1)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Decodes tokens, int32 [B, N], to images, uint8 [B, H, W, 3]. Other tokens raise a `DataError`."""
        layout = self.prior.layout
        tokens = inputs.tokens(tokens, (None, layout.image_length), layout.image_vocab)
        return self.decode_grid(tokens.reshape(-1, layout.height, layout.width))

    def decode_grid(self, tokens: np.ndarray) -> np.ndarray:
        """Decodes token grids of any size, int32 [B, h', w'], to images, uint8 [B, H', W', 3].

        Raises:
          DataError: tokens of another type, or outside the vocabulary.
        """
        tokens = inputs.tokens(tokens, (None, None, None), self.prior.layout.image_vocab)
        decode = functools.partial(drawing.decode, self.tokenizer, self.tokenizer_params)
        return drawing.by_rows(self, decode, tokens)

    @by_name
    def draw_tokens(
        self,
        caption: str | Sequence[str] | None,
        n: int,
        seed: int,
        known: tuple[np.ndarray, np.ndarray],
        window: int = 0,
        **sampling: Any,
    ) -> np.ndarray:
        """Draws the tokens of n images of each caption, given some of them.

        Args:
          caption: a caption, a sequence of C captions, or None for the empty caption.
          n: images to draw for each caption.
          seed: as in `generate`.
          known: tokens int32 [n, N] and mask bool [n, N]; with C in front for a sequence. Where the mask is True, the
            token is returned unchanged.
          window: number of the window on a canvas, which selects other random keys; 0 for a single image.
          **sampling: the sampling parameters.

        Returns:
          int32 [n, N], or [C, n, N] for a sequence.

        Raises:
          DataError: an empty caption, or known tokens of another shape or type.
          ConfigError: a sampling parameter out of range.
        """
        n, seed = drawing.check_count(n, seed)
        options, negative = parse(sampling)
        layout, window = self.prior.layout, natural("window", window)
        if caption is None:
            drawing.warn_of_no_caption(self.prior)
            text = layout.condition.empty()[None]
        else:
            text = self.encode_text(caption)
        one = caption is None or isinstance(caption, str)
        shape = (n, layout.image_length) if one else (len(text), n, layout.image_length)
        known = [x.reshape(len(text), n, -1) for x in inputs.known(known, shape, layout.image_vocab)]
        tokens = np.empty((len(text), n, layout.image_length), np.int32)
        for part in drawing.chunks(self, len(text), n):
            captions, numbers = part.rows()
            each = np.repeat(captions, len(numbers) // len(captions))
            keys = drawing.row_keys(seed, text[captions], numbers, window)
            given = tuple(x[each, numbers] for x in known)
            rows = np.asarray(drawing.sample(self, text[captions], keys, options, negative, given, part))
            tokens[part.place()] = part.images(rows)
        return tokens[0] if one else tokens
