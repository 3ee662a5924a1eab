"""Features of every layer of a trained model: its hidden states, averaged over the positions of the image.

iGPT (Chen et al. 2020, section 3.3) probes its layers this way. A prior reads all tokens of the image, none of them
masked, after the empty condition, so that no label reaches it that way.

    B images    L layers    D width    N image positions
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Shaped, UInt8

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.runs import open_run
from dalle_jax.clip.stored import has_clip
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.models import beit as beits
from dalle_jax.models import clip as clips
from dalle_jax.models import transformer
from dalle_jax.models.beit import BEiT
from dalle_jax.models.clip import CLIP
from dalle_jax.models.norm import Norm
from dalle_jax.models.trunk import for_decoding
from dalle_jax.priors.embedding import StreamEmbedding
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree
from dalle_jax.tasks import beit as beit_task
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.text_to_image import TextToImage

States = list[Float[Array, "B N D"]]  # of the embeddings, then of each layer


@dataclasses.dataclass(frozen=True)
class LayerFeatures:
    """A trained model that gives features. Create one with `open_model`.

    Attributes:
      title: the model's name for people.
      image_size: H = W of the images.
      extract: maps images, uint8 [B, H, W, 3], to features, float32 [B, L + 1, D]. Layer 0 is the embeddings.
    """

    title: str
    image_size: int
    extract: Callable[[UInt8[ArrayLike, "B H W 3"]], Float[Array, "B L D"]]


def open_model(workdir: str, step: int | str | None = None, untrained: bool = False) -> LayerFeatures:
    """Opens a trained model.

    Args:
      workdir: workdir or export of a prior, workdir of a BEiT, or folder of a CLIP.
      step: step of its checkpoint, "best", or None for the latest.
      untrained: use new random parameters instead of the trained ones, for comparison. An image tokenizer stays.

    Raises:
      UserError: the folder holds none of these models.
    """
    task = "clip" if has_clip(workdir) and not workdirs.has_config(workdir) else workdirs.read_config(workdir)["task"]
    if task == "prior":
        model = TextToImage.load(workdir, step)
        params = _initial(model.prior, untrained) or model.params
        params, options = for_decoding(params, model.prior.options)
        prior = dataclasses.replace(model.prior, options=options)
        extract = functools.partial(_of_prior, prior, model.tokenizer, params, model.tokenizer_params)
        return LayerFeatures(f"{prior.name} prior", model.image_size, extract)
    if task == "clip":
        scorer = ClipScorer.load(workdir, step)
        params = _initial(scorer.clip, untrained) or scorer.params
        return LayerFeatures("CLIP", scorer.clip.options.image_size, functools.partial(_of_clip, scorer.clip, params))
    if task == "beit":
        metric = beit_task.best_metric_of(workdirs.read_config(workdir))
        with open_run(workdir, best_metric=metric) as run:
            config, params = run.config(step), run.restore_params(step)
        beit = beit_task.of_params(config, params)
        params, options = for_decoding(_initial(beit, untrained) or params, beit.options)
        beit = dataclasses.replace(beit, options=options)
        return LayerFeatures("BEiT", beit.image_size, functools.partial(_of_beit, beit, params))
    raise ConfigError(f"{workdir} holds a training of task {task!r}; expected a prior, a BEiT or a CLIP.")


def _initial(model: Any, untrained: bool) -> PyTree | None:
    """Returns new parameters, or None if the trained ones are to be used."""
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(0))) if untrained else None


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_prior(
    prior: TokenPrior, tokenizer: ImageTokenizer, params: PyTree, tokenizer_params: PyTree, images: Array
) -> Float[Array, "B L D"]:
    tokens = tokenizer.encode(tokenizer_params, images).reshape(len(images), -1)
    return _averaged(prior_states(prior, params, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _of_beit(beit: BEiT, params: PyTree, images: Array) -> Float[Array, "B L D"]:
    return _averaged(beit_states(beit, params, images))


@functools.partial(jax.jit, static_argnums=0)
def _of_clip(clip: CLIP, params: PyTree, images: Array) -> Float[Array, "B L D"]:
    return _averaged(clip_states(clip, params, images))


def _averaged(states: States) -> Float[Array, "B L D"]:
    """Averages the states of each layer over the image positions."""
    return jnp.stack([state.astype(jnp.float32).mean(axis=1) for state in states], axis=1)


def prior_states(prior: TokenPrior, params: PyTree, tokens: Int[ArrayLike, "B N"]) -> States:
    """Returns the states of a prior at the image positions: its embeddings, and the output of each layer.

    Args:
      prior: the prior, with `trunk.scan=False`.
      params: its unboxed parameters.
      tokens: image tokens in raster order, int32 [B, N].
    """
    rows, length = tokens.shape
    arguments: list = [_empty(prior, rows), tokens]
    if prior.name == "autoregressive" and prior.any_order:
        arguments += [False, jnp.tile(jnp.arange(length)[None], (rows, 1))]
    found = _captured(prior.model, params, arguments, [(StreamEmbedding, "image"), (transformer.Block, "__call__")])
    return [found["embedding"]["image"][0], *_of_trunk(found, prior.options.trunk.depth, prior.stream.prefix_length)]


def _empty(prior: TokenPrior, rows: int) -> Shaped[Array, "B ..."]:
    """Returns the empty condition of a prior for each row."""
    empty = jnp.asarray(prior.layout.condition.empty())
    return jnp.broadcast_to(empty[None], (rows, *empty.shape))


def beit_states(beit: BEiT, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]) -> States:
    """Returns the states of a BEiT at the patches, none of them masked: its embeddings, and after each layer.

    Args:
      beit: the model, with `trunk.scan=False`.
      params: its unboxed parameters.
      images: uint8 [B, H, W, 3] of the model's image size.
    """
    kept = [(beits.BEiTNetwork, "embed"), (transformer.Block, "__call__")]
    found = _captured(beit.network, params, [images], kept)
    return [found["embed"][0][:, 1:], *_of_trunk(found, beit.options.trunk.depth, 1)]


def _of_trunk(found: PyTree, depth: int, first: int) -> States:
    """Returns the captured output of each block from position `first` on."""
    return [found["trunk"][f"layer_{i}"]["__call__"][0][:, first:] for i in range(depth)]


def clip_states(clip: CLIP, params: PyTree, images: UInt8[ArrayLike, "B H W 3"]) -> States:
    """Returns the states of a CLIP's image tower at the patches: before its blocks, and after each of them."""
    pixels = clips.preprocess(images, clip.options.image_size)
    kept = [(Norm, "__call__"), (clips.Block, "__call__")]
    found = _captured(clip.module, params, [pixels], kept, method="encode_image")["image"]
    names = ("norm_before", *(f"block_{i}" for i in range(clip.options.image_depth)))
    first = int(clip.options.image_readout == "class_token")
    return [found[name]["__call__"][0][:, first:] for name in names]


def _captured(
    module: nn.Module, params: PyTree, arguments: list, kept: list[tuple[type, str]], method: str | None = None
) -> PyTree:
    """Runs a module and returns the outputs of the submodules' methods that `kept` lists, by path."""
    keep = lambda submodule, name: any(isinstance(submodule, kind) and name == other for kind, other in kept)
    _, found = module.apply(
        {"params": params}, *arguments, capture_intermediates=keep, mutable=["intermediates"], method=method
    )
    return found["intermediates"]
