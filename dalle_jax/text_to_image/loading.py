"""Loads a trained prior with all that drawing needs from its workdir."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from dalle_jax import compilation_cache
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.downloaded import local
from dalle_jax.checkpoints.exported import ADAPTERS, Exported
from dalle_jax.checkpoints.folders import check_mesh, check_path, check_step, check_workdir
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.clip.stored import has_clip
from dalle_jax.configuration.values import natural
from dalle_jax.data.text import CaptionModel
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.distributed.sharding import replicated, shardings_of
from dalle_jax.errors import CheckpointError, ConfigError, UserError
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.models.attention import kernels
from dalle_jax.priors import trained
from dalle_jax.priors.decoding_weights import check_weights, for_drawing
from dalle_jax.priors.registry import condition_of, make
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree, fingerprint, first_mismatch
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.drawing import MOST_IMAGES
from dalle_jax.token_layout import TokenLayout


def load(
    workdir: str,
    step: int | str | None,
    rows_at_once: int,
    clip: str | None,
    mesh: Mesh | None,
    base: str | None,
    weights: str | None,
) -> dict[str, Any]:
    """Returns the fields of a `TextToImage`. `TextToImage.load` explains arguments and errors."""
    step, rows_at_once = check_step(step), natural("rows_at_once", rows_at_once, 1, MOST_IMAGES)
    check_mesh(mesh)
    check_weights(weights)
    check_path("workdir", workdir)
    workdir, clip = local(workdir), local(clip)
    check_workdir(workdir)
    compilation_cache.enable()
    config = workdirs.read_config(workdir)
    if config.get("task") != "prior":
        raise ConfigError(
            f"{workdir} holds a training of task {config.get('task')!r}. Images are drawn from the workdir of a "
            "prior (python -m dalle_jax.main --config=configs/prior.py)."
        )
    mesh = mesh or local_mesh()
    with open_run(workdir, best_metric="image_nats") as run:
        folder = _base(run, base) or workdir
        tokenizer, tokenizer_params = workdirs.load_tokenizer(folder)
        config = run.config(step)  # it has a checksum; config.json has none
        layout, text_model = _token_layout(workdir, folder, config, tokenizer)
        size = config["data"]["image_size"]
        prior = make(config["prior"], kernels.on_any_device(config["model"]), layout)
        layout_of = lambda stored: _layout(prior, stored, workdir, mesh)
        if folder == workdir:
            params = trained.restore(run, workdir, step, layout=layout_of, tokenizer_params=tokenizer_params)
        else:
            shapes = nn.meta.unbox(jax.eval_shape(prior.init, jax.random.key(0)))
            params = trained.place(trained.restore_adapters(run, folder, shapes, tokenizer_params), layout_of)
        step = run.resolve(step)
    # The stored parameters identify the model, and a conversion would change the hash of those in memory.
    stored = "" if prior.options.trunk.dtype == "float32" and weights is None else fingerprint(params)
    prior, params = for_drawing(prior, params, mesh, weights)
    tokenizer_params = jax.device_put(tokenizer_params, replicated(mesh))
    place = clip or next((one for one in (workdir, folder) if has_clip(one)), None)
    scorer = ClipScorer.load(place, rows_at_once=rows_at_once, mesh=mesh) if place else None
    return {
        "prior": prior,
        "params": params,
        "tokenizer": tokenizer,
        "tokenizer_params": tokenizer_params,
        "text_model": text_model,
        "image_size": size,
        "workdir": str(workdir),
        "step": step,
        "rows_at_once": rows_at_once,
        "scorer": scorer,
        "mesh": mesh,
        "fit": config["data"].get("fit", "crop"),
        "stored_fingerprint": stored,
        "weights": weights,
    }


def _base(run: Checkpoints | Exported, base: str | None) -> str | None:
    """Returns the folder of the base of exported adapters, or None for a whole model.

    Raises:
      ConfigError: a base for a whole model, or none for adapters whose own base is not on this machine.
    """
    if not isinstance(run, Exported) or run.kind != ADAPTERS:
        if base is not None:
            raise ConfigError(f"base is {base!r}, but the model needs none: it holds no adapters. Leave out base.")
        return None
    folder = local(base or str((run.base or {}).get("name", "")))
    if not folder or not workdirs.has_config(folder):
        raise ConfigError(
            f"{run.folder} holds adapters (LoRA) of a prior, and its base {folder!r} is no run: give base=DIR, the "
            "workdir or export that the adapters were trained from."
        )
    return folder


def _token_layout(
    workdir: str, folder: str, config: Mapping[str, Any], tokenizer: ImageTokenizer
) -> tuple[TokenLayout, CaptionModel | None]:
    """Returns the layout of a run's token stream, and the model of its captions in `folder`.

    Raises:
      CheckpointError: sizes that no model has.
    """
    try:
        condition, text_model = condition_of(config).load(config, folder)
        return TokenLayout(condition, tokenizer.vocab_size, *tokenizer.grid(config["data"]["image_size"])), text_model
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{workdir}: its configuration does not fit its models: {error}.") from error


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
            f"{workdir}: the prior's parameter {name} is {given}, but its condition ({prior.layout.condition}) and "
            f"image tokenizer ({prior.layout.image_vocab} codes) need {needed}: put back the text/ and "
            "image_tokenizer/ that it was trained with. An earlier version of dalle_jax may also have written it."
        )
    return shardings_of(expected, mesh)
