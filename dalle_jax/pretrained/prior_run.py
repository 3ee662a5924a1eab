"""Writes an imported prior as an ordinary workdir, from which images are drawn and trainings start."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from dalle_jax.checkpoints import workdir
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.compatibility import to_json
from dalle_jax.data.text import CaptionModel
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree, fingerprint

STEP = 0  # of the only checkpoint: no update of ours
# An option of every importer of a prior, see `Importer.settings`.
DTYPES = ("float32", "bfloat16")
DTYPE_HELP = "Dtype of products and activations. bfloat16 is faster on GPUs and TPUs, and differs a little."


class _NoData:
    """The place in the data of a model that was not trained here."""

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: Any) -> None:
        del state


def check_free(output: str) -> None:
    """Raises a `ConfigError` if the folder holds a checkpoint already."""
    if workdir.steps_of(output):
        raise ConfigError(f"--output={output} holds checkpoints already. Give a new folder.")


def described(prior: TokenPrior) -> str:
    """Returns the sizes of a prior in words, for the last line of the command."""
    trunk, layout = prior.options.trunk, prior.layout
    tokens = f"{layout.height} x {layout.width} tokens of {layout.image_vocab:,}"
    return f"{tokens}, {trunk.depth} layers of width {trunk.width}"


def save(
    output: str,
    name: str,
    prior: TokenPrior,
    params: PyTree,
    tokenizer: ImageTokenizer,
    tokenizer_params: PyTree,
    text_model: CaptionModel,
) -> None:
    """Writes tokenizer, text model, one checkpoint, and the configuration, which comes last.

    Args:
      output: folder to write; see `check_free`.
      name: of the importer. It becomes the variant of the configuration.
      prior: the model.
      params: its parameters, float32 arrays.
      tokenizer: its image tokenizer.
      tokenizer_params: parameters of the tokenizer.
      text_model: its text model.

    Raises:
      UserError: a file cannot be written.
    """
    data = {"source": "auto", "image_size": tokenizer.image_size, "fit": "crop"}  # without a path
    data["condition"] = prior.layout.condition.name
    text = {"vocab_size": text_model.vocab_size, "length": prior.layout.condition.length, "path": ""}
    config = ConfigDict(
        to_json(
            {
                "job": "train", "task": "prior", "variant": name, "seed": 0, "steps": STEP, "workdir": output,
                "data": data, "text": text, "prior": prior.name, "model": dataclasses.asdict(prior.options),
            }
        )
    )  # fmt: skip
    workdir.save_tokenizer(output, tokenizer, tokenizer_params)
    workdir.save_text_model(output, text_model)
    items = {"params": jax.tree.map(jnp.asarray, params)}
    with Checkpoints(output) as checkpoints:
        checkpoints.save(STEP, items, _NoData(), config, frozen=fingerprint({"tokenizer": tokenizer_params}))
    workdir.save_config(output, config)
