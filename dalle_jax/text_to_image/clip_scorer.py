"""How well pictures suit captions, by a trained CLIP or by imported weights.

    from dalle_jax.text_to_image.clip_scorer import ClipScorer
    scorer = ClipScorer.load("runs/clip-shapes")
    scores = scorer.score(images, captions)     # float32 [B], cosines: higher suits better

A scorer can be frozen into any folder (`save`), a prior's workdir among them:

    <folder>/clip/params.msgpack        its parameters,
    <folder>/clip/text.model            its text model: sentencepiece's file, or a tokenizer.json,
    <folder>/clip/options.json          and what it is

    B pictures    C captions    T text positions    E embedding
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dalle_jax.checkpoints import frozen
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.configuration.options import from_config
from dalle_jax.data.byte_pairs import BytePairs
from dalle_jax.data.text import TextModel, encode_captions
from dalle_jax.distributed.chunks import in_chunks
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.distributed.sharding import replicated
from dalle_jax.errors import CheckpointError, DataError
from dalle_jax.models import clip as models
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.pytree import PyTree, fingerprint, first_mismatch
from dalle_jax.storage.files import write_errors

_TEXT_MODELS = {"sentencepiece": TextModel.load, "byte_pairs": BytePairs}


@dataclasses.dataclass(frozen=True)
class ClipScorer:
    """A CLIP with its text model, ready to compare.

    Attributes:
      clip, params: the model and its parameters.
      text_model: captions to ids.
      rows_at_once: pictures or captions that go through a tower in one go: bounds the memory, compiled once.
      mesh: over whose devices these are split, each with the whole model; None: the default device.
    """

    clip: CLIP
    params: PyTree
    text_model: TextModel | BytePairs
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
        """Reads a folder, local or "gs://…": one that `save` or an importer wrote into, or the workdir of a training.

        Args:
          folder: the directory.
          step: of a training's workdir, a checkpoint's step, "best", or None for the latest.
          rows_at_once: see the class.
          mesh: None: all devices of this host.

        Raises:
          CheckpointError: where there is no CLIP there, or its parameters do not fit its text model.
          DataError: where the text model is missing or damaged.
        """
        if has_clip(folder):
            clip, params, text_model = _load_frozen(epath.Path(folder).expanduser() / "clip")
        else:
            config = workdirs.read_config(folder)
            if config.get("task") != "clip":
                raise CheckpointError(
                    f"{folder} holds no CLIP: it is a training of task {config.get('task')!r}. Train one "
                    "(python -m dalle_jax.main --config=configs/clip.py) or import one (dalle_jax.pretrained.clip)."
                )
            text_model = workdirs.load_text_model(folder)
            clip = CLIP(models.from_config(config, text_model.vocab_size))
            with Checkpoints(str(folder), read_only=True) as checkpoints:
                params = checkpoints.restore_params(step)
        _check_fit(clip, params, folder)
        mesh = mesh or local_mesh()
        return cls(clip, jax.device_put(params, replicated(mesh)), text_model, rows_at_once, mesh)

    def save(self, folder: str | epath.PathLike) -> None:
        """Freezes it into `<folder>/clip`, from where `load` reads it."""
        target = epath.Path(folder).expanduser() / "clip"
        with write_errors(target):
            self.text_model.save(target / "text.model")
        kind = "byte_pairs" if isinstance(self.text_model, BytePairs) else "sentencepiece"
        options = {"text_model": kind, **dataclasses.asdict(self.clip.options)}
        frozen.save(target, options, self.params)

    # -- comparing ------------------------------------------------------------------------------------------------

    def score(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """How well each picture suits its caption.

        Args:
          images: uint8 [B, H, W, 3] of any size.
          captions: B of them. A repeated caption is encoded once.

        Returns:
          float32 [B], cosines in [-1, 1].

        Raises:
          DataError: another number of captions than pictures, pictures of another type, or an empty caption.
        """
        if len(images) != len(captions):
            raise DataError(f"{len(images)} pictures and {len(captions)} captions: expected as many of both.")
        places = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
        features = self.text_features(list(places))[[places[caption] for caption in captions]]
        return np.sum(self.image_features(images) * features, axis=1)

    def image_features(self, images: np.ndarray) -> np.ndarray:
        """Pictures, uint8 [B, H, W, 3] of any size, to unit vectors, float32 [B, E].

        Raises:
          DataError: pictures of another type or shape.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise DataError(f"Pictures are {images.dtype} {images.shape}; expected uint8 [B, H, W, 3].")
        return self._in_chunks(_encode_image, images)

    def text_features(self, captions: Sequence[str]) -> np.ndarray:
        """Captions to unit vectors, float32 [C, E].

        Raises:
          DataError: no caption, or an empty one.
        """
        return self._in_chunks(_encode_text, self.encode_text(captions))

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Captions to ids, int32 [C, T]: cut to T - 1, the end token after them and in what is left.

        Raises:
          DataError: no caption, or an empty one.
        """
        options = self.clip.options
        encoded = encode_captions(self.text_model, captions, options.text_length - 1)
        rows = np.full((len(captions), options.text_length), options.end_id, np.int32)
        for row, ids in zip(rows, encoded):
            row[: len(ids)] = ids
        return rows

    def fingerprint(self) -> str:
        """Tells this CLIP's weights from any others'."""
        return fingerprint(self.params)

    def _in_chunks(self, encode: Callable[..., jax.Array], rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.zeros((0, self.clip.options.embed_dim), np.float32)
        return in_chunks(functools.partial(encode, self.clip, self.params), rows, self.rows_at_once, self.mesh)


@functools.partial(jax.jit, static_argnums=0)
def _encode_image(clip: CLIP, params: PyTree, images: jax.Array) -> jax.Array:
    return clip.encode_image(params, images)


@functools.partial(jax.jit, static_argnums=0)
def _encode_text(clip: CLIP, params: PyTree, text: jax.Array) -> jax.Array:
    return clip.encode_text(params, text)


def has_clip(folder: str | epath.PathLike) -> bool:
    """Whether a frozen CLIP is there, whole."""
    return frozen.exists(epath.Path(folder).expanduser() / "clip")


def _load_frozen(folder: epath.Path) -> tuple[CLIP, PyTree, TextModel | BytePairs]:
    options, params = frozen.load(folder, "Delete it, and freeze the CLIP again (ClipScorer.save, or its importer).")
    kind = options.pop("text_model", None)
    if kind not in _TEXT_MODELS:
        raise CheckpointError(f"{folder}: text model of kind {kind!r}; expected one of {', '.join(_TEXT_MODELS)}.")
    clip = CLIP(from_config(CLIPOptions, options, "options"))
    return clip, params, _TEXT_MODELS[kind](folder / "text.model")


def _check_fit(clip: CLIP, params: PyTree, folder: epath.PathLike) -> None:
    """Refuses parameters of other shapes than configuration and text model ask for."""
    wrong = first_mismatch(params, nn.meta.unbox(jax.eval_shape(clip.init, jax.random.key(0))))
    if wrong is not None:
        name, given, asked = wrong
        raise CheckpointError(
            f"{folder}: CLIP's parameter {name} is {given}, but its options and text model ({clip.options.text_vocab} "
            f"ids) ask for {asked}: put back the text model that it was trained with."
        )
