"""Counts the floating-point operations of a model from its sizes, as the basis of utilisation.

A multiplication counts as two operations. Matrix products, convolutions and attention count; attention counts only the
pairs of positions that the mask of its pattern allows. The backward pass costs twice the forward pass, but only once
for the layer that reads the image, which needs no gradient. Extra work of a program does not count: recomputed
activations, masked pairs that are computed anyway, metrics for the log. Image tokenizers count themselves
(`ImageTokenizer.flops`).

    B rows    T text    N image tokens    D width    H heads    K head size    F hidden width    V vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from dalle_jax.clip.flops import image_tower, patches, text_tower
from dalle_jax.models.beit import LABELS, BEiT
from dalle_jax.models.transformer_options import ACTIVATIONS, TransformerOptions
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.token_prior import TokenPrior
from dalle_jax.tasks.beit import BEiTTask
from dalle_jax.tasks.beit_labels import LabelTask
from dalle_jax.tasks.clip import CLIPTask
from dalle_jax.tasks.prior import PriorTask
from dalle_jax.tasks.reconstruction import ReconstructionTask
from dalle_jax.tasks.task import Batch, Task


def training(task: Task, batch: Batch) -> float:
    """Counts one update: forward and backward pass of the model, forward pass of a frozen image tokenizer.

    Args:
      task: the task.
      batch: a batch, or its shapes.

    Raises:
      ValueError: the type of the task is unknown.
    """
    rows = next(iter(batch.values())).shape[0]
    if isinstance(task, PriorTask):
        encoding = task.tokenizer.flops(batch["image"].shape[1]).encoding if "image" in batch else 0.0
        return rows * (3 * prior(task.prior) + encoding)
    if isinstance(task, ReconstructionTask):
        return rows * task.training_flops(batch["image"].shape[1])
    if isinstance(task, (BEiTTask, LabelTask)):
        encoding = task.encoding_flops() if isinstance(task, BEiTTask) else 0.0
        return rows * (3 * beit(task.beit) - beit_patches(task.beit) + encoding)
    if isinstance(task, CLIPTask):
        o = task.clip.options
        seen = 1 + task.negatives.spoiled
        similarities = 2 * rows * (rows + task.negatives.spoiled) * o.embed_dim
        return rows * (3 * (seen * image_tower(o) + text_tower(o)) - seen * patches(o)) + 3 * similarities
    raise ValueError(f"The sizes of {type(task).__name__} are unknown.")


def sampling(prior_: TokenPrior, rows: int) -> float:
    """Counts the sampling of the image tokens of `rows` images, each with its own caption.

    An autoregressive prior computes each position once, MaskGIT computes all image positions at each step.
    """
    lay = prior_.stream
    text = _trunk(prior_, lay.prefix_length, slice(0, lay.prefix_length)) + _encoder(prior_)
    image = _trunk(prior_, lay.image_length, slice(lay.prefix_length, None)) + _image_head(prior_)
    if not isinstance(prior_, MaskGITPrior):
        return rows * (text + image)
    steps = prior_.decoding_steps(None)
    return rows * ((steps if prior_.options.text_reads_image else 1) * text + steps * image)


def prior(one: TokenPrior) -> float:
    """Counts the forward pass of one row in training."""
    lay, text_head = one.layout, 0
    if not isinstance(one, MaskGITPrior):
        text_head = 2 * one.options.predicted_text(lay) * _width(one) * one.options.text_classes(lay)
    return _encoder(one) + _trunk(one, one.stream.length, slice(None)) + text_head + _image_head(one)


def _width(one: TokenPrior) -> int:
    return one.options.trunk.width


def _image_head(one: TokenPrior) -> float:
    lay, d = one.layout, _width(one)
    dense = 2 * lay.image_length * d * d if getattr(one.options, "head", "") == "mlm" else 0
    return dense + 2 * lay.image_length * d * lay.image_vocab


def _trunk(one: TokenPrior, positions: int, queries: slice) -> float:
    """Counts all layers at `positions` positions, with the mask rows `queries`."""
    o: TransformerOptions = one.options.trunk
    pairs = {pattern: int(pattern.mask(one.stream)[queries].sum()) for pattern in set(one.options.patterns)}
    layers = _layers(o, positions, [pairs[pattern] for pattern in one.options.patterns])
    if not one.options.encoder_depth:
        return layers
    inner = o.heads * o.size_per_head  # cross-attention: queries and output, then scores and values
    return layers + o.depth * positions * (4 * o.width * inner + 4 * inner * one.layout.condition.length)


def _encoder(one: TokenPrior) -> float:
    """Counts the encoder of the condition, and the keys and values of its states in all layers of the trunk."""
    if not one.options.encoder_depth:
        return 0
    o, length = one.options.trunk, one.layout.condition.length
    encoder = dataclasses.replace(o, depth=one.options.encoder_depth)
    keys_and_values = o.depth * length * 4 * o.width * o.heads * o.size_per_head
    return _layers(encoder, length, [length**2] * encoder.depth) + keys_and_values


def _layers(o: TransformerOptions, positions: int, pairs: Sequence[int]) -> float:
    """Counts layers at `positions` positions, with these numbers of pairs of query and key."""
    attention = 4 * o.heads * o.size_per_head * sum(pairs)
    kernels = 2 if ACTIVATIONS[o.activation][1] else 1
    per_layer = 4 * o.width * o.heads * o.size_per_head + (kernels + 1) * o.width * o.hidden
    return 2 * positions * o.depth * per_layer + attention


# -- BEiT ---------------------------------------------------------------------------------------------------------


def beit_patches(one: BEiT) -> float:
    """Counts the patch embedding of one image."""
    return 2 * one.layout.image_length * 3 * one.options.patch**2 * one.options.trunk.width


def beit(one: BEiT) -> float:
    """Counts the forward pass of one image."""
    o, length = one.options.trunk, one.layout.length
    read = 1 if one.options.target == LABELS else one.layout.image_length
    layers = _layers(o, length, [length**2] * o.depth)
    return beit_patches(one) + layers + 2 * read * o.width * one.outputs
