"""Scores images against captions with a CLIP: one that was trained here, or imported weights.

    from dalle_jax import ClipScorer
    scorer = ClipScorer.load("runs/clip-shapes")
    scores = scorer.score(images, captions)     # float32 [B], cosines: higher is better

`save` freezes a scorer into any folder, such as the workdir of a prior:

    <folder>/clip/params.msgpack        the parameters; in an exported folder model.safetensors
    <folder>/clip/text.model            the text model: a sentencepiece file, or a tokenizer.json
    <folder>/clip/options.json          the sizes

    B images    C captions    T text positions    E embedding
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from dalle_jax.checkpoints import exported, frozen
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.downloaded import local
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.configuration.options import from_config
from dalle_jax.configuration.values import natural
from dalle_jax.data.byte_pairs import BytePairs
from dalle_jax.data.text import CaptionModel, TextModel, encode_captions
from dalle_jax.distributed.chunks import in_chunks
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.distributed.sharding import replicated
from dalle_jax.errors import CheckpointError, DataError
from dalle_jax.models import clip as models
from dalle_jax.models.attention import kernels
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.pytree import PyTree, fingerprint, first_mismatch
from dalle_jax.storage.files import expanded, write_errors
from dalle_jax.text_to_image import inputs
from dalle_jax.text_to_image.drawing import MOST_IMAGES
from dalle_jax.text_to_image.folders import check_mesh, check_path, check_step, check_workdir

_TEXT_MODELS = {"sentencepiece": TextModel.load, "byte_pairs": BytePairs}


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
        folder = local(folder)
        if has_clip(folder):
            clip, params, text_model = _load_frozen(expanded(folder) / "clip")
        else:
            check_workdir(folder)
            config = workdirs.read_config(folder)
            if config.get("task") != "clip":
                raise CheckpointError(
                    f"{folder} holds no CLIP: it is a training of task {config.get('task')!r}. Train one "
                    "(python -m dalle_jax.main --config=configs/clip.py) or import one (dalle_jax.pretrained.clip)."
                )
            text_model = workdirs.load_text_model(folder)
            with open_run(folder, best_metric="loss") as checkpoints:
                config = checkpoints.config(step)  # it has a checksum; config.json has none
                here = {**config, "model": kernels.on_any_device(config["model"])}
                clip = CLIP(models.options_of_training(here, text_model.vocab_size))
                params = checkpoints.restore_params(step)
        _check_fit(clip, params, folder)
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
        target = expanded(folder) / "clip"
        with write_errors(target):
            self.text_model.save(target / "text.model")
        kind = "byte_pairs" if isinstance(self.text_model, BytePairs) else "sentencepiece"
        options = {"text_model": kind, **dataclasses.asdict(self.clip.options)}
        if dtype is None:
            frozen.save(target, options, self.params)
        else:
            frozen.save(target, options, exported.rounded(self.params, dtype), frozen.SAFETENSORS)

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
            features[places] = self._in_chunks(_encode_image, np.stack([pixels[i] for i in places]))
        return features

    def encode_images(self, images: jax.Array) -> jax.Array:
        """Encodes a batch on the devices: uint8 [B, H, W, 3] to unit vectors, float32 [B, E]."""
        return _encode_image(self.clip, self.params, images)

    def text_features(self, captions: Sequence[str]) -> np.ndarray:
        """Encodes captions to unit vectors.

        Args:
          captions: C captions, or a string: one caption.

        Returns:
          float32 [C, E].

        Raises:
          DataError: no caption, or an empty one.
        """
        return self._in_chunks(_encode_text, self.encode_text(captions))

    def encode_text(self, captions: Sequence[str]) -> np.ndarray:
        """Encodes captions to ids.

        Args:
          captions: C captions. They are cut to T - 1 tokens; the end token fills the rest of each row.

        Returns:
          int32 [C, T].

        Raises:
          DataError: no caption, or an empty one.
        """
        options, captions = self.clip.options, inputs.captions(captions)
        encoded = encode_captions(self.text_model, captions, options.text_length - 1)
        rows = np.full((len(captions), options.text_length), options.end_id, np.int32)
        for row, ids in zip(rows, encoded):
            row[: len(ids)] = ids
        return rows

    def fingerprint(self) -> str:
        """Hashes the parameters: 16 hexadecimal digits that differ between different CLIPs."""
        return fingerprint(self.params)

    def _in_chunks(self, encode: Callable[..., jax.Array], rows: np.ndarray) -> np.ndarray:
        return in_chunks(functools.partial(encode, self.clip, self.params), rows, self.rows_at_once, self.mesh)


@functools.partial(jax.jit, static_argnums=0)
def _encode_image(clip: CLIP, params: PyTree, images: jax.Array) -> jax.Array:
    return clip.encode_image(params, images)


@functools.partial(jax.jit, static_argnums=0)
def _encode_text(clip: CLIP, params: PyTree, text: jax.Array) -> jax.Array:
    return clip.encode_text(params, text)


def has_clip(folder: str | epath.PathLike) -> bool:
    """Returns whether the folder holds a complete frozen CLIP."""
    return frozen.exists(expanded(folder) / "clip")


def parameter_count(params: PyTree) -> str:
    """Counts the numbers in a tree of arrays, for people: "1,234,567 parameters"."""
    return f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters"


def _load_frozen(folder: epath.Path) -> tuple[CLIP, PyTree, CaptionModel | BytePairs]:
    options, params = frozen.load(folder, "Delete it, and freeze the CLIP again (ClipScorer.save, or its importer).")
    kind = options.pop("text_model", None)
    if not isinstance(kind, str) or kind not in _TEXT_MODELS:
        raise CheckpointError(f"{folder}: text model of kind {kind!r}; expected one of {', '.join(_TEXT_MODELS)}.")
    clip = CLIP(from_config(CLIPOptions, kernels.on_any_device(options), "", "options.json"))
    return clip, params, _TEXT_MODELS[kind](folder / "text.model")


def _check_fit(clip: CLIP, params: PyTree, folder: epath.PathLike) -> None:
    """Raises CheckpointError if the parameters have other shapes than the options and the text model need."""
    wrong = first_mismatch(params, nn.meta.unbox(jax.eval_shape(clip.init, jax.random.key(0))))
    if wrong is not None:
        name, given, needed = wrong
        raise CheckpointError(
            f"{folder}: CLIP's parameter {name} is {given}, but its options and text model ({clip.options.text_vocab} "
            f"ids) need {needed}: put back the text model that it was trained with."
        )
