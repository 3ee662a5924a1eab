"""Training of BEiT: masked patches of an image are predicted from the others (arXiv 2106.08254, section 2.3).

The target "tokens" is the image's tokens of a frozen image tokenizer, which reads the image at the size at which one
token stands for one patch: half the size for patches of 16 pixels and tokens of 8. The pixel targets need no tokenizer.
With the target "labels" the task is another one (`beit_labels.py`): fine-tuning to the classes of class folders.

    B rows    N = h·w patches    P side of a patch
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from dalle_jax import keys
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration.options import from_config
from dalle_jax.data.examples import batch_shapes
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.distributed.rows import to_host
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.resampling import depth_to_space
from dalle_jax.image_tokenizers.signed_pixels import from_signed
from dalle_jax.image_tokenizers.tokenizer import ImageTokenizer
from dalle_jax.models.attention import kernels
from dalle_jax.models.beit import LABELS, PIXELS, TOKENS, BEiT, BEiTOptions, pixel_targets
from dalle_jax.models.patch_masks import draw_masks
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.priors.losses import cross_entropy
from dalle_jax.pytree import PyTree
from dalle_jax.reporting.images import to_uint8
from dalle_jax.tasks import beit_labels, words
from dalle_jax.tasks.preview import preview_grid, shown_rows
from dalle_jax.tasks.reconstruction import row_means, row_sums
from dalle_jax.tasks.task import Batch, Job, Task, make_job, zeros_like

_PREVIEW_ROWS = 8
_GREY = 128


class BEiTTask:
    """The `Task` of BEiT with a target that needs no labels.

    Attributes:
      schedules: none.
      best_metric: "loss" on the evaluation split.
      title, studies: see `Task`.
      frozen: "tokenizer", the parameters of the image tokenizer, for the target "tokens".
      beit: the model to train.
    """

    schedules: dict[str, optax.Schedule] = {}
    best_metric = "loss"
    title, studies = "BEiT", "images"

    def __init__(self, beit: BEiT, tokenizer: ImageTokenizer | None = None, tokenizer_params: PyTree | None = None):
        """Creates the task.

        Args:
          beit: the model to train.
          tokenizer: gives the tokens to predict; None for the other targets.
          tokenizer_params: parameters of the tokenizer.
        """
        self.beit, self._tokenizer = beit, tokenizer
        self.frozen = {} if tokenizer is None else {"tokenizer": tokenizer_params}

    def init(self, key: jax.Array) -> PyTree:
        """See `Task.init`."""
        return self.beit.init(key)

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Task.loss`. The batch needs "image", uint8 [B, H, W, 3].

        With the target "tokens" the scalars are "token_accuracy", the share of masked tokens that the first choice is.
        """
        del step
        mask_key, dropout_key = jax.random.split(key)
        found = _per_row(self.beit, self._tokenizer, params, frozen, batch["image"], mask_key, dropout_key)
        scalars = {name: jnp.mean(values) for name, values in found.items()}
        return scalars.pop("loss"), scalars

    def evaluate(self, params: PyTree, frozen: PyTree, batches: Iterable[Batch], key: jax.Array) -> dict[str, float]:
        """See `Task.evaluate`. Returns "loss" and the scalars of `loss`, means over the valid rows."""
        measure = functools.partial(_measure, self.beit, self._tokenizer, params, frozen)
        return row_means(measure(batch, keys.stream(key, "batch", i)) for i, batch in enumerate(batches))

    def encoding_flops(self) -> float:
        """Counts the operations of the tokenizer for one image; see `aot/model_flops.py`."""
        if self._tokenizer is None:
            return 0.0
        return self._tokenizer.flops(self.beit.layout.height * self._tokenizer.downsample).encoding

    def preview(self, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array) -> np.ndarray:
        """Draws images, each with its masked patches in grey and the prediction of these patches."""
        images, valid = to_host((batch["image"], batch["valid"]))
        rows = shown_rows(valid, _PREVIEW_ROWS)
        images = images[rows]
        masked, drawn = to_host(_predict(self.beit, self._tokenizer, params, frozen, jnp.asarray(images), key))
        side, patch = self.beit.layout.height, self.beit.options.patch
        pixels = masked.reshape(-1, side, side).repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
        columns = [("real", images), ("masked", np.where(pixels, _GREY, images).astype(np.uint8))]
        return preview_grid([""] * len(rows), [*columns, ("predicted", to_uint8(drawn))])

    def in_words(self, metrics: Mapping[str, float], examples: int) -> list[str]:
        """See `Task.in_words`."""
        del examples
        if self._tokenizer is None:
            return [f"The error of the masked patches is {metrics['loss']:.3g}."]
        return words.tokens_in_words(
            {"image_nats": metrics["loss"], "image_accuracy": metrics["token_accuracy"]},
            self._tokenizer.vocab_size,
            masked=True,
        )

    def next_steps(self, config: ConfigDict, workdir: str, batch: Batch, flags: Sequence[str]) -> list[str]:
        """See `Task.next_steps`."""
        del batch, flags
        labels = words.flag("config.start_from", workdir), "--config.model.target=labels", "--config.data.path=CLASSES"
        return [
            f"see what its layers know: python experiments/linear_probe.py --workdir={workdir} --output=DIR",
            f"fine-tune it to classes: {words.train_command('beit', config, *labels)}",
        ]


# These are functions of model and tokenizer, not methods of the task, because `jax.jit` keeps its static arguments
# alive, and the task holds the frozen arrays.


def target_tokens(tokenizer: ImageTokenizer, params: PyTree, images: jax.Array, side: int) -> jax.Array:
    """Returns the token of each patch: uint8 [B, H, W, 3] to int32 [B, N].

    Args:
      tokenizer: the image tokenizer.
      params: its parameters.
      images: of any size. They are resized so that the grid of tokens is that of the patches.
      side: h = w.
    """
    size = side * tokenizer.downsample
    if images.shape[1] != size:
        shape = (images.shape[0], size, size, 3)
        resized = jax.image.resize(images.astype(jnp.float32), shape, "linear", antialias=True)
        images = jnp.clip(jnp.round(resized), 0, 255).astype(jnp.uint8)
    return tokenizer.encode(params, images).reshape(images.shape[0], -1)


def _draw(beit: BEiT, key: jax.Array, rows: int) -> jax.Array:
    """Draws masked patches, bool [B, N]."""
    o, layout = beit.options, beit.layout
    grid = layout.height, layout.width
    return draw_masks(o.masks, key, rows, grid, o.masked(layout.image_length), o.smallest_block)


def _per_row(
    beit: BEiT,
    tokenizer: ImageTokenizer | None,
    params: PyTree,
    frozen: PyTree,
    images: jax.Array,
    mask_key: jax.Array,
    dropout_key: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Returns the loss of each row, and with a tokenizer the accuracy, means over its masked patches: [B] each."""
    masked = _draw(beit, mask_key, images.shape[0])
    outputs = beit(params, images, masked, dropout_key)
    if tokenizer is not None:
        tokens = target_tokens(tokenizer, frozen["tokenizer"], images, beit.layout.height)
        found = {"loss": cross_entropy(outputs, tokens), "token_accuracy": jnp.argmax(outputs, axis=-1) == tokens}
    elif beit.options.target == PIXELS:
        found = {"loss": jnp.abs(outputs - pixel_targets(images, beit.options.patch, False)).mean(axis=-1)}
    else:
        found = {"loss": jnp.square(outputs - pixel_targets(images, beit.options.patch, True)).mean(axis=-1)}
    count = beit.options.masked(beit.layout.image_length)
    return {name: jnp.where(masked, values, 0).sum(axis=1) / count for name, values in found.items()}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measure(
    beit: BEiT, tokenizer: ImageTokenizer | None, params: PyTree, frozen: PyTree, batch: Batch, key: jax.Array
) -> dict[str, jax.Array]:
    """Returns sums over the valid rows of a batch."""
    return row_sums(_per_row(beit, tokenizer, params, frozen, batch["image"], key), batch["valid"])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict(
    beit: BEiT, tokenizer: ImageTokenizer | None, params: PyTree, frozen: PyTree, images: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the masked patches, bool [B, N], and images with their predictions, float32 [B, H', W', 3] in [0, 1].

    With a tokenizer the whole image is decoded from tokens, the true ones where nothing is masked.
    """
    masked, side = _draw(beit, key, images.shape[0]), beit.layout.height
    outputs = beit(params, images, masked)
    if tokenizer is not None:
        tokens = target_tokens(tokenizer, frozen["tokenizer"], images, side)
        tokens = jnp.where(masked, jnp.argmax(outputs, axis=-1).astype(tokens.dtype), tokens)
        return masked, tokenizer.decode(frozen["tokenizer"], tokens.reshape(-1, side, side))
    pixels = pixel_targets(images, beit.options.patch, False)
    if beit.options.target != PIXELS:  # of a normalized patch: the mean and the deviation are the true ones
        outputs = outputs * pixels.std(axis=-1, keepdims=True) + pixels.mean(axis=-1, keepdims=True)
    pixels = jnp.where(masked[..., None], outputs, pixels)
    return masked, from_signed(depth_to_space(pixels.reshape(-1, side, side, pixels.shape[-1]), beit.options.patch))


# -- from configurations ------------------------------------------------------------------------------------------


def make(config: Mapping[str, Any] | ConfigDict, outputs: int) -> BEiT:
    """Returns the model of a configuration.

    Args:
      config: the configuration of a training, or the content of a workdir's config.json.
      outputs: number of tokens or classes. Pixel targets need none.

    Raises:
      ConfigError: an unknown option, or sizes that do not fit each other.
    """
    options, size = from_config(BEiTOptions, config["model"], "model"), config["data"]["image_size"]
    options.side(size)
    return BEiT(options, size, outputs if options.target in (TOKENS, LABELS) else 3 * options.patch**2)


def of_params(config: Mapping[str, Any], params: PyTree) -> BEiT:
    """Returns the model of a finished training, whose outputs are those of its parameters.

    Args:
      config: the content of a workdir's config.json.
      params: the parameters of its checkpoint.
    """
    here = {**config, "model": kernels.on_any_device(config["model"])}
    return make(here, params[f"head_{config['model']['target']}"]["kernel"].shape[-1])


def best_metric_of(config: Mapping[str, Any]) -> str:
    """Returns the metric that selects the best checkpoint of a training; see `Task.best_metric`."""
    labels = config["model"]["target"] == LABELS
    return beit_labels.LabelTask.best_metric if labels else BEiTTask.best_metric


def needs_tokenizer(config: Mapping[str, Any] | ConfigDict) -> bool:
    """Returns whether a training predicts the tokens of an image tokenizer."""
    return config["model"]["target"] == TOKENS


def check_config(config: ConfigDict) -> None:
    """See `registry.check_config`."""
    options = from_config(DataOptions, config.data, "data")
    make(config, 1)
    if config.model.target == LABELS:
        beit_labels.check_data(options)


def build(config: ConfigDict, workdir: str, rows: Sequence[int] | None = None) -> Job:
    """Builds the job of `configs/beit.py`. For tokens the workdir must hold a frozen image tokenizer.

    Raises:
      ConfigError: an unknown key, or sizes that do not fit each other.
      DataError: the data cannot be opened, or has no classes.
    """
    options = from_config(DataOptions, config.data, "data")
    if config.model.target == LABELS:
        labels, *sources = beit_labels.labelled_splits(options, workdir)
        task = beit_labels.LabelTask(make(config, labels.vocab_size), labels)
        captions = beit_labels.ids_of(labels.vocab_size)
        return make_job(task, config, options, rows, labels, captions, held_out=sources[1], source=sources[0])
    if not needs_tokenizer(config):
        return make_job(BEiTTask(make(config, 0)), config, options, rows)
    tokenizer, params = workdirs.load_tokenizer(workdir)
    return make_job(BEiTTask(make(config, tokenizer.vocab_size), tokenizer, params), config, options, rows)


def abstract(config: ConfigDict, tokenizer: ImageTokenizer | None = None) -> tuple[Task, Batch]:
    """See `registry.abstract`. Labels are of 1,000 classes."""
    size, batch_size = config.data.image_size, config.batch_size
    if config.model.target == LABELS:
        captions = beit_labels.ids_of(beit_labels.ASSUMED_CLASSES)
        task = beit_labels.LabelTask(make(config, beit_labels.ASSUMED_CLASSES), None)
        return task, batch_shapes(size, captions, batch_size)
    if not needs_tokenizer(config):
        return BEiTTask(make(config, 0)), batch_shapes(size, None, batch_size)
    tokenizer = tokenizer or tokenizers.of_training(config.tokenizer)
    task = BEiTTask(make(config, tokenizer.vocab_size), tokenizer, zeros_like(tokenizer.init, jax.random.key(0)))
    return task, batch_shapes(size, None, batch_size)


def options(config: Mapping[str, Any]) -> dict[str, type]:
    """See `tasks.options`."""
    del config
    return {"model": BEiTOptions, "model.trunk": TransformerOptions}
