"""Saves and loads a CLIP with its text model: from the workdir of its training, or frozen into any folder.

<folder>/clip/params.msgpack        the parameters; in an exported folder model.safetensors
<folder>/clip/text.model            the text model: a sentencepiece file, or a tokenizer.json
<folder>/clip/options.json          the sizes
"""

from __future__ import annotations

import dataclasses
import os
from typing import NamedTuple

import flax.linen as nn
import jax
from etils import epath

from dalle_jax.checkpoints import exported, frozen
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.downloaded import local
from dalle_jax.checkpoints.folders import check_workdir
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.configuration.options import from_config
from dalle_jax.data.byte_pairs import BytePairs
from dalle_jax.data.text import CaptionModel, TextModel
from dalle_jax.errors import CheckpointError
from dalle_jax.models import clip as models
from dalle_jax.models.attention import kernels
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.pytree import PyTree, first_mismatch
from dalle_jax.storage.files import expanded, write_errors

_TEXT_MODELS = {"sentencepiece": TextModel.load, "byte_pairs": BytePairs}


class StoredClip(NamedTuple):
    """A CLIP as it is stored.

    Attributes:
      clip: the model.
      params: its parameters.
      text_model: converts captions to ids.
    """

    clip: CLIP
    params: PyTree
    text_model: CaptionModel | BytePairs


def has_clip(folder: str | os.PathLike) -> bool:
    """Returns whether the folder holds a complete frozen CLIP."""
    return frozen.exists(expanded(folder) / "clip")


def load(folder: str | os.PathLike, step: int | str | None = None) -> StoredClip:
    """Loads a CLIP from a folder, local or "gs://…".

    Args:
      folder: a folder that `save`, an importer of `dalle_jax.pretrained` or an export wrote, the workdir of a training,
        or the export of a hub, "hf://owner/name".
      step: step of a checkpoint in a workdir, "best", or None for the latest.

    Raises:
      CheckpointError: no CLIP in the folder, or parameters that do not fit its text model.
      DamagedError: a file changed since it was written.
      DataError: the text model is missing, or not a text model.
    """
    folder = local(folder)
    if has_clip(folder):
        found = _frozen(expanded(folder) / "clip")
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
            found = StoredClip(clip, checkpoints.restore_params(step), text_model)
    _check_fit(found, folder)
    return found


def save(folder: str | os.PathLike, stored: StoredClip, dtype: str | None = None) -> None:
    """Freezes a CLIP into `<folder>/clip`, where `load` finds it.

    Args:
      folder: the folder, local or "gs://…". A CLIP that is already there is replaced.
      stored: the CLIP.
      dtype: None for the format of workdirs. "float32" or "bfloat16" for safetensors, see `exported.rounded`.

    Raises:
      UserError: the folder cannot be written.
    """
    target = expanded(folder) / "clip"
    with write_errors(target):
        stored.text_model.save(target / "text.model")
    kind = "byte_pairs" if isinstance(stored.text_model, BytePairs) else "sentencepiece"
    options = {"text_model": kind, **dataclasses.asdict(stored.clip.options)}
    if dtype is None:
        frozen.save(target, options, stored.params)
    else:
        frozen.save(target, options, exported.rounded(stored.params, dtype), frozen.SAFETENSORS)


def _frozen(folder: epath.Path) -> StoredClip:
    options, params = frozen.load(folder, "Delete it, and freeze the CLIP again (ClipScorer.save, or its importer).")
    kind = options.pop("text_model", None)
    if not isinstance(kind, str) or kind not in _TEXT_MODELS:
        raise CheckpointError(f"{folder}: text model of kind {kind!r}; expected one of {', '.join(_TEXT_MODELS)}.")
    clip = CLIP(from_config(CLIPOptions, kernels.on_any_device(options), "", "options.json"))
    return StoredClip(clip, params, _TEXT_MODELS[kind](folder / "text.model"))


def _check_fit(stored: StoredClip, folder: str | os.PathLike) -> None:
    """Raises CheckpointError if the parameters have other shapes than the options and the text model need."""
    clip, params, _ = stored
    wrong = first_mismatch(params, nn.meta.unbox(jax.eval_shape(clip.init, jax.random.key(0))))
    if wrong is not None:
        name, given, needed = wrong
        raise CheckpointError(
            f"{folder}: CLIP's parameter {name} is {given}, but its options and text model ({clip.options.text_vocab} "
            f"ids) need {needed}: put back the text model that it was trained with."
        )
