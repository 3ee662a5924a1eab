"""Training of a prior over image tokens given a condition, with a frozen image tokenizer (DALL-E, section 2.2).

B rows    N = h·w image tokens
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from dalle_jax import keys
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data import token_store
from dalle_jax.data.examples import batch_shapes
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import CaptionModel
from dalle_jax.distributed.rows import to_host
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.metrics.mean import Mean, without_empty
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.priors import lora, trained
from dalle_jax.priors.condition import KEY, Condition
from dalle_jax.priors.lora import LoRAOptions
from dalle_jax.priors.registry import condition_of, make, options_of
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.pytree import PyTree
from dalle_jax.reporting.images import to_uint8
from dalle_jax.tasks import words
from dalle_jax.tasks.adapters import base_of, check_adapters
from dalle_jax.tasks.encoded_split import given_tokens, tokens_of_split
from dalle_jax.tasks.image_conditions import with_conditions
from dalle_jax.tasks.preview import own_captions, preview_grid, shown_rows
from dalle_jax.tasks.task import Batch, Job, make_job, zeros_like
from dalle_jax.token_layout import TokenLayout

# Values of `config.data_tokens`. Any other one is a folder.
ONCE, EACH_BATCH = "once", "each_batch"
_OF_OWN = 4  # samples of each own caption in a preview


class PriorTask:
    """The `Task` of an autoregressive or MaskGIT prior.

    Attributes:
      schedules: the prior's schedules.
      best_metric: "image_nats", nats per image token on the evaluation split.
      title, studies: see `Task`.
      frozen: "tokenizer", the parameters of the image tokenizer; and "base", those of the prior under adapters.
      split_shapes: see `Task`; the base is split.
    """

    best_metric = "image_nats"
    studies = "captions"

    def __init__(
        self,
        prior: TokenPrior,
        tokenizer: ImageTokenizer,
        tokenizer_params: PyTree,
        text_model: CaptionModel | None,
        preview_rows: int = 4,
        adapters: LoRAOptions | None = None,
        base: PyTree | None = None,
        captions: Sequence[str] = (),
    ):
        """Creates the task.

        Args:
          prior: the model to train.
          tokenizer: encodes images to tokens.
          tokenizer_params: parameters of the tokenizer.
          text_model: decodes captions for the preview; None if no preview is drawn.
          preview_rows: number of captions in the preview.
          adapters: options of adapters, which are then the only trained parameters; None to train all parameters.
          base: frozen parameters of the prior that adapters are added to.
          captions: captions to preview instead of those of held-out examples.
        """
        self._adapters, self._captions = adapters, list(captions)
        self.prior, self.tokenizer, self._text_model, self._preview_rows = prior, tokenizer, text_model, preview_rows
        self.title = f"{prior.name} prior"
        self.schedules = dict(prior.schedules)
        self.frozen = {"tokenizer": tokenizer_params} | ({} if adapters is None else {"base": base})
        self.split_shapes = {} if adapters is None else {"base": jax.eval_shape(prior.init, jax.random.key(0))}

    def init(self, key: jax.Array) -> PyTree:
        """See `Task.init`."""
        if self._adapters is not None:
            return lora.init(key, self.frozen["base"], self._adapters)
        params = self.prior.init(key, self.tokenizer.codebook(self.frozen["tokenizer"]))
        if not self.prior.options.codebook_init:
            return params
        key, condition = keys.stream(key, "condition"), self.prior.layout.condition
        return {**params, "embedding": condition.start(params["embedding"], self._text_model, key)}

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task.loss`. The scalars are those of the prior.

        A batch of a split that was encoded in advance has "tokens" and no "image".
        """
        if "tokens" in batch:
            tokens = batch["tokens"].astype(jnp.int32)
        else:
            tokens = _encode(self.tokenizer, frozen["tokenizer"], batch["image"])
        given = self.prior.layout.condition.of_batch(batch)
        return self.prior.loss(self._whole(params, frozen), given, tokens, key, train=True, step=step)

    def _whole(self, params: PyTree, frozen: PyTree) -> PyTree:
        """Returns the parameters of the prior: those that are trained, or the base with the trained adapters."""
        return params if self._adapters is None else lora.merge(frozen["base"], params, self._adapters)

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """See `Task.evaluate`. Returns means of the prior's metrics over the valid rows.

        A metric without a value is left out, such as that of a range of mask ratios without an example.
        """
        mean, params = Mean(), self._whole(params, frozen)
        for i, batch in enumerate(batches):
            batch_key = keys.stream(key, "batch", i)
            scalars = to_host(_measure(self.prior, self.tokenizer, params, frozen["tokenizer"], batch, batch_key))
            rows = float(scalars.pop("rows"))
            mean.add(scalars, weight=rows)
        return without_empty(mean.take())

    def preview(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> np.ndarray:
        """Draws captions, each with the real image, its reconstruction and two samples; or four of each own caption."""
        if self._captions:
            return self._preview_of_own(params, frozen, key)
        condition = self.prior.layout.condition
        given, real, valid = to_host((condition.of_batch(batch), batch["image"], batch["valid"]))
        rows = shown_rows(valid, self._preview_rows)
        count, given, real = len(rows), given[rows], real[rows]
        drawn = self.prior.sample(self._whole(params, frozen), jnp.asarray(given), jax.random.split(key, 2 * count))
        images = to_uint8(to_host(_decode(self.tokenizer, frozen["tokenizer"], jnp.asarray(real), drawn)))
        captions = [condition.decode(row, self._text_model) for row in given]
        reconstructed, first, second = images[:count], images[count::2], images[count + 1 :: 2]
        columns = [("real", real), ("reconstructed", reconstructed), ("generated", first), ("generated", second)]
        return preview_grid(captions, columns)

    def _preview_of_own(self, params: PyTree, frozen: PyTree, key: jax.Array) -> np.ndarray:
        """Draws four samples of each of the given captions."""
        layout = self.prior.layout
        given = layout.condition.encode(self._captions, self._text_model)
        keys = jax.random.split(key, _OF_OWN * len(given))
        tokens = self.prior.sample(self._whole(params, frozen), jnp.asarray(given), keys)
        images = to_uint8(to_host(_decode_tokens(self.tokenizer, frozen["tokenizer"], tokens, layout)))
        return preview_grid(self._captions, [("generated", images[i::_OF_OWN]) for i in range(_OF_OWN)])

    def in_words(self, metrics: Mapping[str, float], examples: int) -> list[str]:
        """See `Task.in_words`."""
        del examples
        return words.tokens_in_words(metrics, self.tokenizer.vocab_size, masked=self.prior.name == "maskgit")

    def next_steps(self, config: ConfigDict, workdir: str, batch: Batch, flags: Sequence[str]) -> list[str]:
        """See `Task.next_steps`."""
        condition, valid = self.prior.layout.condition, np.asarray(batch["valid"])
        if not condition.reads_requests:
            upsampler = words.flag("config.upsampler", workdir)
            return [f"enlarge what another prior draws: {words.draw_command(config.low_from, [], *flags, upsampler)}"]
        given = (condition.decode(row, self._text_model) for row in np.asarray(condition.of_batch(batch))[valid])
        captions = words.example_captions(given, 2)
        return [f"draw captions: {words.draw_command(workdir, captions, *flags)}"]


# These are functions of prior and tokenizer, not methods of the task. `jax.jit` keeps its static arguments alive, and
# the task holds the frozen arrays.


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    prior: TokenPrior, tokenizer: ImageTokenizer, params: PyTree, tokenizer_params: PyTree, batch: Batch, key: jax.Array
) -> dict[str, jax.Array]:
    """Returns the loss and the metrics of a batch, and "rows", the number of its valid rows."""
    tokens = _encode(tokenizer, tokenizer_params, batch["image"])
    loss, scalars = prior.loss(
        params, prior.layout.condition.of_batch(batch), tokens, key, train=False, valid=batch["valid"]
    )
    return {"loss": loss, **scalars, "rows": batch["valid"].sum()}


@functools.partial(jax.jit, static_argnums=0)
def _decode(tokenizer: ImageTokenizer, params: PyTree, images: jax.Array, drawn: jax.Array) -> jax.Array:
    """Reconstructs R images, uint8 [R, H, W, 3], and decodes D drawn rows, int32 [D, N]: float32 [R + D, H, W, 3]."""
    tokens = jnp.concatenate([_encode(tokenizer, params, images), drawn])
    return tokenizer.decode(params, tokens.reshape(-1, *tokenizer.grid(images.shape[1])))


@functools.partial(jax.jit, static_argnums=(0, 3))
def _decode_tokens(tokenizer: ImageTokenizer, params: PyTree, tokens: jax.Array, layout: TokenLayout) -> jax.Array:
    """Decodes rows, int32 [D, N]: float32 [D, H, W, 3]."""
    return tokenizer.decode(params, tokens.reshape(-1, layout.height, layout.width))


def _encode(tokenizer: ImageTokenizer, params: PyTree, images: jax.Array) -> jax.Array:
    """Encodes uint8 images [B, H, W, 3] to int32 tokens [B, N] in raster order."""
    tokens = tokenizer.encode(params, images)
    return tokens.reshape(tokens.shape[0], -1)


def _task(
    config: ConfigDict,
    tokenizer: ImageTokenizer,
    params: PyTree,
    condition: Condition,
    text_model: CaptionModel | None = None,
    base: Callable[[TokenPrior], PyTree] | None = None,
) -> PriorTask:
    """Builds the task of a configuration for a tokenizer and a condition. `base` returns that of adapters."""
    layout = TokenLayout(condition, tokenizer.vocab_size, *tokenizer.grid(config.data.image_size))
    prior, options = make(config.prior, config.model, layout), trained.lora_of(config)
    captions = own_captions(config)
    if not options.rank:
        return PriorTask(prior, tokenizer, params, text_model, captions=captions)
    frozen = base(prior) if base else zeros_like(prior.init, jax.random.key(0))
    return PriorTask(prior, tokenizer, params, text_model, adapters=options, base=frozen, captions=captions)


def _check_data_tokens(config: ConfigDict) -> None:
    """Checks `config.data_tokens`: "each_batch", "once", or a folder of tokens that were encoded in advance."""
    given = config.data_tokens
    if given == EACH_BATCH:
        return
    if given != ONCE:
        if not given or not token_store.exists(given):
            raise ConfigError(
                f"config.data_tokens is {given!r}; expected 'once', 'each_batch', or the workdir of a run of "
                "configs/encode.py."
            )
        found = token_store.read_description(given)
        if found.image_size != config.data.image_size:
            raise ConfigError(
                f"config.data_tokens={given!r} holds the tokens of images of {found.image_size} pixels, and "
                f"config.data.image_size is {config.data.image_size}. Give --config.data.image_size={found.image_size}."
            )
    if config.data.augment != "none":
        raise ConfigError(
            f"config.data_tokens is {given!r} but config.data.augment is {config.data.augment!r}. Augmented images "
            "have other tokens in each epoch. Set data.augment to 'none' or data_tokens to 'each_batch'."
        )


def check_config(config: ConfigDict) -> None:
    """See `registry.check_config`."""
    from_config(DataOptions, config.data, "data")
    from_config(options_of(config.prior), config.model, "model")
    if "text" in config:
        workdirs.check_text_section(config.text)
    check_adapters(config)
    own_captions(config)
    _check_data_tokens(config)
    first = config.model.get("raster_steps")
    if first and config.steps and first >= config.steps:
        raise ConfigError(
            f"config.model.raster_steps is {first} and config.steps {config.steps}: no update would mask tokens or "
            f"have random orders, as drawing needs. Set --config.model.raster_steps={config.steps // 3}, for example."
        )
    last = config.model.get("anneal_end")
    if last and config.model.order != "random":
        raise ConfigError(
            f"config.model.anneal_end is {last} and config.model.order {config.model.order!r}, not 'random'. Set "
            "--config.model.order=random, or --config.model.anneal_start=0 and --config.model.anneal_end=0."
        )
    if last and config.steps and last > config.steps:
        raise ConfigError(
            f"config.model.anneal_end is {last} and config.steps {config.steps}: the last updates would still have "
            f"random orders. Set --config.model.anneal_end={config.steps}, for example."
        )


def build(config: ConfigDict, workdir: str, rows: Sequence[int] | None = None) -> Job:
    """Builds the job of `configs/prior.py`. The workdir must hold a frozen image tokenizer (see `jobs/train.py`).

    Raises:
      ConfigError: tokenizer, image size, text model and prior do not fit each other.
    """
    options = from_config(DataOptions, config.data, "data")
    tokenizer, params = workdirs.load_tokenizer(workdir)
    source = open_source(options, options.train_split)
    condition, text_model = condition_of(config).prepare(config, source, workdir)
    tokens = None
    if config.data_tokens == ONCE:
        folders = [workdir, *([config.start_from] if config.get("start_from") else [])]
        tokens = tokens_of_split(options, options.train_split, tokenizer, params, folders)
    elif config.data_tokens != EACH_BATCH:
        tokens = given_tokens(config.data_tokens, options, options.train_split, tokenizer, params)
    base = lambda prior: base_of(config, workdir, prior)
    task = _task(config, tokenizer, params, condition, text_model, base)
    if first := config.model.get("raster_steps"):
        logging.info(
            "The first %d of %d updates predict image tokens in raster order, and the others %s "
            "(model.raster_steps). Until then validation and previews are poor.",
            first, config.steps, "random masked tokens" if config.prior == "maskgit" else "in random orders",
        )  # fmt: skip
    captions = condition.caption_model(text_model)
    job = make_job(task, config, options, rows, captions, condition.captions, tokens=tokens)
    return with_conditions(job, options, condition, text_model, workdir) if condition.from_images else job


def abstract(config: ConfigDict, tokenizer: ImageTokenizer | None = None) -> tuple[PriorTask, Batch]:
    """See `registry.abstract`."""
    tokenizer = tokenizer or tokenizers.of_training(config.tokenizer)
    params = zeros_like(tokenizer.init, jax.random.key(0))
    condition = condition_of(config).of_config(config)
    task = _task(config, tokenizer, params, condition)
    tokens = None if config.data_tokens == EACH_BATCH else task.prior.layout
    batch = batch_shapes(config.data.image_size, condition.captions, config.batch_size, tokens=tokens)
    if condition.from_images:
        empty = condition.empty()
        batch[KEY] = jax.ShapeDtypeStruct((config.batch_size, *empty.shape), empty.dtype)
    return task, batch


def options(config: Mapping[str, Any]) -> dict[str, type]:
    """See `tasks.options`."""
    return {"model": options_of(config["prior"]), "model.trunk": TransformerOptions, "lora": LoRAOptions}
