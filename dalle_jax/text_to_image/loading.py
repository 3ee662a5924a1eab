"""Loads a trained prior with all that drawing needs from its workdir."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from dalle_jax import compilation_cache
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.downloaded import local
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.configuration.values import natural
from dalle_jax.distributed.mesh import local_mesh
from dalle_jax.distributed.sharding import replicated, shardings_of
from dalle_jax.errors import CheckpointError, ConfigError
from dalle_jax.models.attention import kernels
from dalle_jax.priors.decoding_weights import for_drawing
from dalle_jax.priors.registry import make
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree, fingerprint, first_mismatch
from dalle_jax.text_to_image.clip_scorer import ClipScorer, has_clip
from dalle_jax.text_to_image.drawing import MOST_IMAGES
from dalle_jax.text_to_image.folders import check_mesh, check_path, check_step, check_workdir
from dalle_jax.token_layout import TokenLayout


def load(
    workdir: str, step: int | str | None, rows_at_once: int, clip: str | None, mesh: Mesh | None
) -> dict[str, Any]:
    """Returns the fields of a `TextToImage`. `TextToImage.load` explains arguments and errors."""
    step, rows_at_once = check_step(step), natural("rows_at_once", rows_at_once, 1, MOST_IMAGES)
    check_mesh(mesh)
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
    tokenizer, tokenizer_params = workdirs.load_tokenizer(workdir)
    text_model = workdirs.load_text_model(workdir)
    mesh = mesh or local_mesh()
    with open_run(workdir, best_metric="image_nats") as checkpoints:
        config = checkpoints.config(step)  # it has a checksum; config.json has none
        size, length = config["data"]["image_size"], config["text"]["length"]
        layout = TokenLayout(text_model.vocab_size, tokenizer.vocab_size, length, *tokenizer.grid(size))
        prior = make(config["prior"], kernels.on_any_device(config["model"]), layout)
        layout_of = lambda stored: _layout(prior, stored, workdir, mesh)
        params = checkpoints.restore_params(step, layout=layout_of, frozen=fingerprint({"tokenizer": tokenizer_params}))
        step = checkpoints.resolve(step)
    # The stored parameters identify the model, and a conversion would change the hash of those in memory.
    stored = "" if prior.options.trunk.dtype == "float32" else fingerprint(params)
    prior, params = for_drawing(prior, params, mesh)
    tokenizer_params = jax.device_put(tokenizer_params, replicated(mesh))
    folder = clip or (workdir if has_clip(workdir) else None)
    scorer = ClipScorer.load(folder, rows_at_once=rows_at_once, mesh=mesh) if folder else None
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
    }


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
