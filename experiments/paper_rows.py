"""The rows of `papers.py`: what the papers say, which keys of the configs that is, and why a value differs.

A row's paper value is written as `papers.shown` writes ours. "not said" stands for what the paper leaves open. The
sources are DALL-E (arXiv 2102.12092), MaskGIT (2202.04200) with the configuration that google-research/maskgit released
("released"), and CLIP (2103.00020), its tables 18 and 20 and the released code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from dalle_jax.models import clip
from dalle_jax.priors import masking
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.token_layout import TokenLayout


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
      what: the quantity, with the paper's section.
      paper: the paper's value, formatted as ours.
      keys: dotted keys of the configuration, separated by blanks. "we have" is their values.
      why: the reason for another value; empty if ours is the paper's.
      show: formats the values of the keys; None lists them.
    """

    what: str
    paper: str
    keys: str
    why: str = ""
    show: Callable[..., str] | None = None


def unless(*neutral: Any) -> Callable[..., str]:
    """Formats options of ours that the paper does not have: "none" if all of them have their neutral value."""
    return lambda *values: "none" if values == neutral else f"{values} instead of {neutral}"


def zero_is_none(value: float) -> str:
    return f"{value:g}" if value else "none"


def percent(value: float) -> str:
    return f"{value:.0%}"


def average(decay: float, every: int) -> str:
    return f"{decay:g}, every update" if every == 1 else f"{decay:g}, every {every} updates"


def crop(name: str) -> str:
    return {
        "none": "centre square",
        "dvae": "random square, resized to 9/8 to 12/8, random crop, flip",
        "prior": "square near the centre, resized to 1 to 9/8, random crop",
        "clip": "random square of the resized image",
    }[name]


def decay_of(name: str) -> str:
    return {
        "kernels": "kernels, no gains, biases and embeddings",
        "weights": "all weights that are not gains or biases",
        "all": "all parameters",
    }[name]


RANGE = "bfloat16 has float32's range, so the loss needs no scaling"
EMA = "ema.decay ema.every"
ADAM = "optimizer.b1 optimizer.b2 optimizer.eps"

# -- DALL-E, stage one --------------------------------------------------------------------------------------------

DVAE = (
    Row("image size (2.1)", "256", "data.image_size"),
    Row(
        "augmentation (listing 1)", "random square, resized to 9/8 to 12/8, random crop, flip", "data.augment",
        show=crop,
    ),
    Row("codes (2.1)", "8,192", "model.vocab_size"),
    Row("pixels per token (2.1)", "8", "model.groups model.stem_factor", show=lambda g, s: str(s * 2 ** (g - 1))),
    Row("width of the first blocks (released code)", "256", "model.hidden"),
    Row("groups of blocks, blocks in each", "4, 2", "model.groups model.blocks_per_group"),
    Row("first kernel", "7", "model.in_kernel"),
    Row("width of a code's vector", "128", "model.codebook_dim"),
    Row("activations (A.2)", "float16 mixed precision", "model.dtype", RANGE),
    Row(
        "additions of ours", "none",
        "model.stem_factor model.logit_scale model.codebook_scale model.min_log_scale objective.init",
        show=unless(1, 1.0, 1.0, None, "paper"),
    ),
    Row("sharpness of initial clusters", "not said", "objective.kmeans_sharpness", "objective.init=paper has none"),
    Row("KL weight β (A.2)", "0 to 6.6, cosine, 5,000 updates", "schedules.kl_weight"),
    Row("temperature τ (A.2)", "1 to 0.0625, cosine, 150,000 updates", "schedules.temperature"),
    Row("step size (A.2)", "0.0001 to 1.25e-6, cosine, 1,200,000 updates", "schedules.learning_rate"),
    Row("AdamW β1, β2, ε (A.2)", "0.9, 0.999, 1e-8", ADAM),
    Row("weight decay (A.2)", "0.0001", "optimizer.weight_decay"),
    Row("decayed parameters", "not said", "optimizer.decay", "as in the paper's stage two", decay_of),
    Row("gradient clip", "none", "optimizer.clip_norm", show=zero_is_none),
    Row("clip of the running variance", "none", "optimizer.clip_variance", show=zero_is_none),
    Row("Adam's first moment", "not said", "optimizer.first_moment", "97 million parameters leave room for float32"),
    Row("factors of the step size", "none", "optimizer.scales"),
    Row("parts with their own settings", "none", "optimizer.parts"),
    Row("average of the parameters (A.2)", "0.999, every update", EMA, show=average),
    Row("batch (A.2)", "512", "batch_size"),
    Row("updates (A.2)", "3,000,000", "steps"),
)  # fmt: skip

# -- DALL-E, stage two --------------------------------------------------------------------------------------------


def prior(width: int, heads: int) -> tuple[Row, ...]:
    """Returns the rows of a size of the autoregressive prior."""
    return (
        Row("width (2.2)", f"{width:,}", "model.trunk.width"),
        Row("layers (2.2)", "64", "model.trunk.depth"),
        Row("heads (2.2)", f"{heads}", "model.trunk.heads"),
        Row(
            "head size (2.2)", "64", "model.trunk.width model.trunk.heads model.trunk.head_dim",
            show=lambda width, heads, size: str(size or width // heads),
        ),
        Row("width of the MLP", "not said", "model.trunk.mlp_ratio", "four times the width, as in GPT"),
        Row("norm", "not said", "model.trunk.norm", "as in GPT"),
        Row(
            "place of norms, number of final norms", "not said", "model.trunk.norm_placement model.trunk.final_norms",
            "as in GPT",
        ),
        Row("norm of the embeddings", "not said", "model.trunk.embedding_norm", "none in GPT"),
        Row("epsilon of norms; 0: 1e-5", "not said", "model.trunk.norm_epsilon", "as in GPT"),
        Row("biases of queries, keys, values", "not said", "model.trunk.qkv_bias", "none in our transformers"),
        Row("biases of the heads", "not said", "model.head_bias", "none in GPT"),
        Row("a class for each padding", "not said", "model.padding_classes", "paddings need not be told apart"),
        Row("activation", "not said", "model.trunk.activation", "as in GPT"),
        Row("norm of queries and keys", "not said", "model.trunk.qk_norm", "none in GPT"),
        Row("positions (2.2, figure 10)", "learned", "model.trunk.positions"),
        Row(
            "dropout, of attention", "not said", "model.trunk.dropout model.trunk.attention_dropout",
            "each image is seen less than twice",
        ),
        Row("drop path, LayerScale", "not said", "model.trunk.drop_path model.trunk.layer_scale", "none in GPT"),
        Row("attention (figure 11)", "sparse", "model.attention"),
        Row("convolutional window (figure 11)", "11", "model.kernel"),
        Row("the window wraps at row ends (figure 11)", "yes", "model.wrap"),
        Row("order of tokens", "raster", "model.order"),
        Row("activations (2.4)", "float16, scaled per block", "model.trunk.dtype", RANGE),
        Row("residual stream in float32 (figure 4)", "yes", "model.trunk.float32_residual"),
        Row("logits in float32 (D.2)", "yes", "model.trunk.float32_logits"),
        Row("start tokens (2.2, figure 10)", "yes", "model.start_tokens"),
        Row("embeddings are also unembeddings", "no", "model.tied_embeddings"),
        Row("initial scale of embeddings, heads", "not said", "model.embedding_scale model.head_scale", "as in GPT"),
        Row("weight of the text's loss (2.2)", "0.125", "model.text_weight"),
        Row("captions dropped for guidance", "0%", "model.caption_drop", show=percent),
        Row(
            "additions of ours", "none",
            "model.raster_steps model.anneal_start model.anneal_end model.neighbour_kernel model.codebook_init "
            "model.torus model.shifted model.encoder_depth model.encoder_padding",
            show=unless(0, 0, 0, 0, False, False, False, 0, None),
        ),
        Row("image size (2.1)", "256", "data.image_size"),
        Row(
            "augmentation (listing 2)", "square near the centre, resized to 1 to 9/8, random crop", "data.augment",
            show=crop,
        ),
        Row("BPE dropout (2.2)", "10%", "data.bpe_dropout", show=percent),
        Row("text vocabulary, positions (2.2)", "16,384, 256", "text.vocab_size text.length"),
        Row("AdamW β1, β2, ε (B.2)", "0.9, 0.96, 1e-8", ADAM),
        Row("weight decay (B.2)", "0.045", "optimizer.weight_decay"),
        Row("decayed parameters (B.2)", "kernels, no gains, biases and embeddings", "optimizer.decay", show=decay_of),
        Row("gradient clip (B.2)", "4", "optimizer.clip_norm"),
        Row("clip of the running variance (B.2)", "5", "optimizer.clip_variance"),
        Row(
            "Adam's first moment of kernels (D.2)", "16 bits", "optimizer.first_moment",
            "JAX has no 1-6-9; TPUs have bfloat16",
        ),
        Row("factors of the step size", "none", "optimizer.scales"),
        Row("parts with their own settings", "none", "optimizer.parts"),
        Row(
            "step size (B.2)", "0 to 0.00045 in 5,000 updates, then halved on five plateaus", "schedules.learning_rate",
            "no public rule for plateaus; resume with half of schedules.learning_rate.value",
        ),
        Row("average of the parameters (B.2)", "0.99, every 25 updates", EMA, show=average),
        Row("batch (B.2)", "1,024", "batch_size"),
        Row("updates (B.2)", "430,000", "steps"),
    )  # fmt: skip


# -- MaskGIT ------------------------------------------------------------------------------------------------------


def decoding_steps(steps: int | None) -> str:
    """Returns the number of steps at 32 x 32 tokens."""
    return str(MaskGITPrior(TokenLayout(Text(1, 1), 2, 32, 32), MaskGITOptions(steps=steps)).decoding_steps(None))


def quarter_of_ten() -> str:
    """Returns how many of 10 tokens are masked at γ = 0.25: ⌈2.5⌉ in the paper, ⌊2.5⌋ in its code."""
    return str(int(masking.training_counts("linear", np.float32([0.75]), 10)[0]))


MASKGIT = (
    Row("layers, width (4.1)", "24, 768", "model.trunk.depth model.trunk.width"),
    Row(
        "heads (4.1)", "8; released: 16", "model.trunk.heads model.trunk.head_dim",
        "as released", lambda heads, size: f"{heads} of {size}" if size else str(heads),
    ),
    Row(
        "width of the MLP (4.1)", "3,072", "model.trunk.width model.trunk.mlp_ratio",
        show=lambda width, ratio: f"{round(width * ratio):,}",
    ),
    Row("norm (4.1)", "layernorm", "model.trunk.norm"),
    Row(
        "place of norms, number of final norms (released)", "post, 0",
        "model.trunk.norm_placement model.trunk.final_norms", "as in the autoregressive prior",
    ),
    Row("norm of the embeddings (released)", "yes", "model.trunk.embedding_norm", "as in the autoregressive prior"),
    Row("epsilon of norms (released)", "1e-12", "model.trunk.norm_epsilon", "0: 1e-5, as in GPT"),
    Row("biases of queries, keys, values (released)", "yes", "model.trunk.qkv_bias", "as in the autoregressive prior"),
    Row("activation (released)", "gelu_tanh", "model.trunk.activation"),
    Row("norm of queries and keys", "no", "model.trunk.qk_norm"),
    Row("positions (4.1)", "learned", "model.trunk.positions"),
    Row("dropout (4.1)", "0.1", "model.trunk.dropout"),
    Row("dropout of attention (released)", "0.1", "model.trunk.attention_dropout"),
    Row("drop path, LayerScale", "0, 0", "model.trunk.drop_path model.trunk.layer_scale"),
    Row("activations (released)", "float32", "model.trunk.dtype", "TPUs multiply in bfloat16"),
    Row("residual stream in float32 (released)", "yes", "model.trunk.float32_residual"),
    Row("logits in float32 (released)", "yes", "model.trunk.float32_logits", "TPUs multiply in bfloat16"),
    Row(
        "initialisation (4.1)", "normal of 0.02, cut at 0.04", "model.init_scale",
        show=lambda scale: f"normal of {scale:g}, cut at {2 * scale:g}",
    ),
    Row("initial scale of embeddings, heads", "0.02, 0.02", "model.embedding_scale model.head_scale"),
    Row("head (released)", "mlm", "model.head"),
    Row("activation of the head (released)", "gelu_tanh", "model.head_activation", "exact; the two differ by 0.001"),
    Row("the condition reads the image (released)", "yes", "model.text_reads_image", "captions are computed once then"),
    Row("embeddings are also the head (released)", "yes", "model.tied_embeddings"),
    Row("mask schedule γ (3.3)", "cosine", "model.mask_schedule"),
    Row("masked of 10 tokens if γ is 0.25 (3.1)", "3; released: 2", "", "as released", quarter_of_ten),
    Row("label smoothing (4.1)", "0.1", "model.label_smoothing"),
    Row("the loss is a mean over (equation 1)", "tokens", "model.loss_average"),
    Row("weight of unmasked tokens (equation 1)", "0", "model.unmasked_weight"),
    Row("order of unmasking (3.2)", "confidence", "model.order"),
    Row("temperature of that order (released)", "4.5", "model.choice_temperature"),
    Row("decoding steps at 32x32 tokens (4.2)", "12", "model.steps", show=decoding_steps),
    Row("captions dropped for guidance", "0%", "model.caption_drop", show=percent),
    Row(
        "additions of ours", "none",
        "model.codebook_init model.neighbour_kernel model.raster_steps model.encoder_depth model.encoder_padding",
        show=unless(False, 0, 0, 0, None),
    ),
    Row(
        "condition", "a class", "text.vocab_size text.length", "this is a text-to-image model",
        lambda size, length: f"a caption of {length} tokens, {size:,} ids",
    ),
    Row("dropout of that condition", "none", "data.bpe_dropout", "BPE dropout, as in DALL-E", percent),
    Row("image size (4.1)", "256 and 512", "data.image_size", "DALL-E's"),
    Row(
        "augmentation (4.1)", "random resize and crop", "data.augment",
        "captions name places and sides, so crops stay near the centre as in DALL-E", crop,
    ),
    Row(
        "image tokenizer (4.1)", "VQGAN, 1,024 codes", "tokenizer.task tokenizer.model.vocab_size",
        "DALL-E's; give tokenizer_from=DIR for another", lambda task, codes: f"{task}, {codes:,} codes",
    ),
    Row("Adam β1, β2 (4.1)", "0.9, 0.96", "optimizer.b1 optimizer.b2"),
    Row("Adam's ε", "not said", "optimizer.eps", "Adam's default"),
    Row("weight decay (released)", "0.045", "optimizer.weight_decay"),
    Row("decayed parameters", "not said", "optimizer.decay", "as in DALL-E; no training code is released", decay_of),
    Row("gradient clip (released)", "none", "optimizer.clip_norm", show=zero_is_none),
    Row("clip of the running variance", "none", "optimizer.clip_variance", show=zero_is_none),
    Row("Adam's first moment (released)", "float32", "optimizer.first_moment"),
    Row("factors of the step size", "none", "optimizer.scales"),
    Row("parts with their own settings", "none", "optimizer.parts"),
    Row("step size (released)", "0 to 0.0001 in 5,000 updates, then constant", "schedules.learning_rate"),
    Row("average of the parameters (released)", "0.999, every update", EMA, show=average),
    Row("batch (4.1)", "256", "batch_size"),
    Row("updates (4.1)", "300 epochs: 1,501,200; released: 2,000,000", "steps", "as released"),
)  # fmt: skip

# -- CLIP ---------------------------------------------------------------------------------------------------------

CLIP = (
    Row("image size, patch (table 20)", "224, 32", "data.image_size model.patch"),
    Row(
        "image layers, width, heads (table 20)", "12, 768, 12", "model.image_depth model.image_width model.image_heads",
    ),
    Row("text layers, width, heads (table 20)", "12, 512, 8", "model.text_depth model.text_width model.text_heads"),
    Row(
        "width of an image MLP (released)", "3,072", "model.image_width model.image_mlp",
        show=lambda width, hidden: f"{hidden or 4 * width:,}",
    ),
    Row("width of both vectors (table 20)", "512", "model.embed_dim"),
    Row("activation (released)", "quick_gelu", "model.activation"),
    Row("the image is read from (2.4)", "class_token", "model.image_readout"),
    Row("largest factor on similarities (2.5)", "100", "", show=lambda: f"{math.exp(clip.MAX_LOG_SCALE):g}"),
    Row("activations (2.5)", "float16 mixed precision", "model.dtype", RANGE),
    Row("additions of ours", "none", "model.image_positions negatives.spoiled", show=unless(1.0, 0)),
    Row(
        "grid, squares of corrupted images", "not said", "negatives.grid negatives.squares",
        "negatives.spoiled=0 has none",
    ),
    Row("text ids with the end token (table 18)", "49,408", "text.vocab_size", show=lambda size: f"{size + 1:,}"),
    Row("text positions without the end token (2.4)", "76", "text.length"),
    Row("BPE dropout", "0%", "data.bpe_dropout", show=percent),
    Row("augmentation (2.3)", "random square of the resized image", "data.augment", show=crop),
    Row("Adam β1, β2, ε (table 18)", "0.9, 0.98, 1e-6", ADAM),
    Row("weight decay (table 18)", "0.2", "optimizer.weight_decay"),
    Row("decayed parameters (2.5)", "all weights that are not gains or biases", "optimizer.decay", show=decay_of),
    Row("gradient clip", "none", "optimizer.clip_norm", show=zero_is_none),
    Row("clip of the running variance", "none", "optimizer.clip_variance", show=zero_is_none),
    Row("Adam's moments (2.5)", "half precision", "optimizer.first_moment", "151 million leave room for float32"),
    Row("factors of the step size", "none", "optimizer.scales"),
    Row("parts with their own settings", "none", "optimizer.parts"),
    Row(
        "step size (2.5, tables 18 and 20)", "0 to 0.0005 in 2,000 updates, cosine to 0 at 390,625",
        "schedules.learning_rate",
    ),
    Row("average of the parameters", "none", EMA, show=lambda decay, every: average(decay, every) if decay else "none"),
    Row("batch (table 18)", "32,768", "batch_size"),
    Row("updates (table 18: 32 epochs of 400 million)", "390,625", "steps"),
)  # fmt: skip

TABLES = {
    "dvae.py:paper": DVAE,
    "prior.py:paper": prior(3968, 62),
    "prior.py:5.6b": prior(2688, 42),
    "prior.py:2.8b": prior(1920, 30),
    "maskgit.py:paper": MASKGIT,
    "clip.py:vit_b32": CLIP,
}
