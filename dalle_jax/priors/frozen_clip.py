"""A CLIP from any folder that holds one: the model, its parameters, and the text model that it was trained with.

<folder>/clip/params.msgpack        the parameters; in an exported folder model.safetensors
<folder>/clip/text.model            the text model: a sentencepiece file, or a tokenizer.json
<folder>/clip/options.json          the sizes

B images    C captions    T text positions    E embedding
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jaxtyping import Array, ArrayLike, Float, Int, UInt8

from dalle_jax.checkpoints import exported, frozen
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.configuration.options import from_config
from dalle_jax.data.byte_pairs import BytePairs
from dalle_jax.data.text import CaptionModel, TextModel, encode_captions
from dalle_jax.errors import CheckpointError
from dalle_jax.models import clip as models
from dalle_jax.models.attention import kernels
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.pytree import PyTree, first_mismatch
from dalle_jax.storage.files import expanded, write_errors

_TEXT_MODELS = {"sentencepiece": TextModel.load, "byte_pairs": BytePairs}
_REMEDY = "Delete it, and freeze the CLIP again (ClipScorer.save, or its importer)."


@dataclasses.dataclass(frozen=True)
class FrozenClip:
    """A CLIP with its text model.

    Attributes:
      clip, params: the model and its parameters.
      text_model: converts captions to ids.
    """

    clip: CLIP
    params: PyTree
    text_model: CaptionModel | BytePairs

    def image_features(self, images: UInt8[ArrayLike, "B H W 3"]) -> Float[np.ndarray, "B E"]:
        """Encodes images of one size to unit vectors, float32."""
        return np.asarray(encode_images(self.clip, self.params, images))

    def text_features(self, captions: Sequence[str]) -> Float[np.ndarray, "C E"]:
        """Encodes captions to unit vectors, float32.

        Raises:
          DataError: no caption, or an empty one.
        """
        return np.asarray(encode_texts(self.clip, self.params, ids_of(self.clip, self.text_model, captions)))

    def unknown_letters(self, text: str) -> str:
        """Returns the different letters of a caption that the text model lacks."""
        return self.text_model.unknown_letters(text)


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


# -- folders ------------------------------------------------------------------------------------------------------


def has_clip(folder: str | epath.PathLike) -> bool:
    """Returns whether the folder holds a complete frozen CLIP."""
    return frozen.exists(expanded(folder) / "clip")


def embed_dim_of(folder: str | epath.PathLike) -> int:
    """Returns E of the CLIP in a folder, without its parameters. Raises a `CheckpointError` if there is no CLIP."""
    if has_clip(folder):
        return load(folder).clip.options.embed_dim
    return int(_training(folder)["model"]["embed_dim"])


def load(folder: str | epath.PathLike, step: int | str | None = None) -> FrozenClip:
    """Loads a CLIP.

    Args:
      folder: a folder that `save`, an importer of `dalle_jax.pretrained` or an export wrote, or the workdir of a
        training.
      step: step of a checkpoint in a workdir, "best", or None for the latest.

    Raises:
      CheckpointError: no CLIP in the folder, or parameters that do not fit its text model.
      DamagedError: a file changed since it was written.
      DataError: the text model is missing, or not a text model.
    """
    if has_clip(folder):
        found = _load_frozen(expanded(folder) / "clip")
    else:
        _training(folder)
        text_model = workdirs.load_text_model(folder)
        with open_run(folder, best_metric="loss") as checkpoints:
            config = checkpoints.config(step)  # it has a checksum; config.json has none
            here = {**config, "model": kernels.on_any_device(config["model"])}
            clip = CLIP(models.options_of_training(here, text_model.vocab_size))
            found = FrozenClip(clip, checkpoints.restore_params(step), text_model)
    _check_fit(found, folder)
    return found


def save(folder: str | epath.PathLike, model: FrozenClip, dtype: str | None = None) -> None:
    """Freezes a CLIP into `<folder>/clip`, where `load` finds it.

    Args:
      folder: the folder, local or "gs://…". A CLIP that is already there is replaced.
      model: the CLIP.
      dtype: None for the format of workdirs. "float32" or "bfloat16" for safetensors, see `exported.rounded`.

    Raises:
      UserError: the folder cannot be written.
    """
    target = expanded(folder) / "clip"
    with write_errors(target):
        model.text_model.save(target / "text.model")
    kind = "byte_pairs" if isinstance(model.text_model, BytePairs) else "sentencepiece"
    options = {"text_model": kind, **dataclasses.asdict(model.clip.options)}
    if dtype is None:
        frozen.save(target, options, model.params)
    else:
        frozen.save(target, options, exported.rounded(model.params, dtype), frozen.SAFETENSORS)


def _training(folder: str | epath.PathLike) -> dict:
    """Returns the configuration of a training of CLIP; raises a `CheckpointError` for another one."""
    config = workdirs.read_config(folder)
    if config.get("task") != "clip":
        raise CheckpointError(
            f"{folder} holds no CLIP: it is a training of task {config.get('task')!r}. Train one "
            "(python -m dalle_jax.main --config=configs/clip.py) or import one (dalle_jax.pretrained.clip)."
        )
    return config


def _load_frozen(folder: epath.Path) -> FrozenClip:
    options, params = frozen.load(folder, _REMEDY)
    kind = options.pop("text_model", None)
    if not isinstance(kind, str) or kind not in _TEXT_MODELS:
        raise CheckpointError(f"{folder}: text model of kind {kind!r}; expected one of {', '.join(_TEXT_MODELS)}.")
    clip = CLIP(from_config(CLIPOptions, kernels.on_any_device(options), "", "options.json"))
    return FrozenClip(clip, params, _TEXT_MODELS[kind](folder / "text.model"))


def _check_fit(model: FrozenClip, folder: str | epath.PathLike) -> None:
    """Raises CheckpointError if the parameters have other shapes than the options and the text model need."""
    wrong = first_mismatch(model.params, nn.meta.unbox(jax.eval_shape(model.clip.init, jax.random.key(0))))
    if wrong is not None:
        name, given, needed = wrong
        raise CheckpointError(
            f"{folder}: CLIP's parameter {name} is {given}, but its options and text model "
            f"({model.clip.options.text_vocab} ids) need {needed}: put back the text model that it was trained with."
        )
