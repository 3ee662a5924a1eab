"""The MaskGIT prior: a bidirectional transformer that refines all image tokens at once (arXiv 2202.04200).

Training masks some of a picture's tokens and predicts them from the rest and the caption; decoding starts with all of
them masked and uncovers more in each of a few steps. The paper's masked-token head is dense, GELU, norm, then the
image embedding, transposed, and a bias for each token. Guidance rises linearly over the steps (Muse, arXiv 2301.00704,
section 2.7).

Deviations: pre-norm blocks, as in the other prior (the reference is post-norm BERT); a caption instead of a class,
computed once: text positions do not read the image. Where pictures are few, three options learn far faster than the
paper's model: `codebook_init`, `neighbour_kernel`, and the head "linear".

    B rows    C captions    T text    N image tokens    D width    V image vocabulary
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.configuration.options import check
from dalle_jax.distributed.sharding import constrain
from dalle_jax.models.attention.patterns import Bidirectional, Pattern
from dalle_jax.models.dense import Dense
from dalle_jax.models.transformer import Norm, TransformerOptions, Trunk, for_decoding
from dalle_jax.priors import masking, sampling
from dalle_jax.priors.embedding import StreamEmbedding, start_from_codebook
from dalle_jax.priors.losses import cross_entropy, drop_captions, mean_over, uniform_cross_entropy
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.token_layout import TokenLayout

HEADS = ("mlm", "linear")
BUCKETS = 4  # of the share of masked tokens, for the log


@dataclasses.dataclass(frozen=True)
class MaskGITOptions:
    """What the prior adds to its trunk.

    Attributes:
      trunk: sizes and choices of the transformer.
      head: "mlm" (the paper's) or "linear" (the last product and the bias alone).
      tied_embeddings: the head's product is with the image embedding, transposed.
      embedding_scale: standard deviation of the embeddings at initialisation.
      head_scale: the same of heads that are not tied.
      codebook_init: image embedding and head start as the tokenizer's codebook, see `start_from_codebook`.
      neighbour_kernel: side of the square of tokens that each token's embedding is mixed from; 0: itself alone.
      mask_schedule: γ, see `masking.masked_share`; the same in training and decoding.
      label_smoothing: share of the target spread over the vocabulary.
      unmasked_weight: of the unmasked positions in the loss; a masked one counts 1.
      caption_drop: share of captions emptied in training, for guidance.
      steps: T, decoding steps where `sample` is not told.
      order: of unmasking, see `masking.unmasking_order`.
      choice_temperature: τ of the order "confidence".
    """

    trunk: TransformerOptions = TransformerOptions()
    head: str = "mlm"
    tied_embeddings: bool = True
    embedding_scale: float = 0.02
    head_scale: float = 0.02
    codebook_init: bool = False
    neighbour_kernel: int = 0
    mask_schedule: str = "cosine"
    label_smoothing: float = 0.1
    unmasked_weight: float = 0.0
    caption_drop: float = 0.1
    steps: int = 8
    order: str = "confidence"
    choice_temperature: float = 4.5

    def __post_init__(self):
        masking.check_schedule(self.mask_schedule)
        choices = {"order": masking.ORDERS, "head": HEADS}
        shares = ["label_smoothing", "unmasked_weight", "caption_drop"]
        kernel = ["neighbour_kernel"]
        check(self, "model", positive=["steps"], at_least_0=kernel, odd=kernel, share=shares, choices=choices)

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        return (Bidirectional(),) * self.trunk.depth


class MaskGITEmbedding(StreamEmbedding):
    """Adds the mask's embedding and the mixing of neighbours: a convolution of each channel by itself over the grid of
    image embeddings, beside the embedding itself (a positional encoding generator, arXiv 2102.10882).

    Attributes:
      kernel: side of its square; 0 for none.
    """

    kernel: int

    def setup(self):
        super().setup()
        self.mask = self.table("mask", 1, "positions")
        if self.kernel:
            # The taps' sum has variance 2, whatever the kernel: neighbours weigh about as much as the token itself.
            init = nn.with_logical_partitioning(nn.initializers.normal(1.5 / self.kernel), (None, None, "embed"))
            self.neighbours = self.param("neighbours_kernel", init, (self.kernel, self.kernel, self.trunk.width))

    def image_tokens(self, tokens: jax.Array) -> jax.Array:
        """See `StreamEmbedding.image_tokens`; what lies outside of the grid is zero."""
        vocab = self.layout.image_vocab
        x = super().image_tokens(jnp.minimum(tokens, vocab - 1))
        x = jnp.where((tokens == vocab)[..., None], self.mask[0][None, None], x)
        if not self.kernel:
            return x
        height, width, half = self.layout.height, self.layout.width, self.kernel // 2
        grid = x.reshape(-1, height, width, x.shape[-1])
        padded = jnp.pad(grid, ((0, 0), (half, half), (half, half), (0, 0)))
        # Shifted sums, not a convolution: XLA's gradient of a depthwise one is slow, on CPUs above all.
        for row in range(self.kernel):
            for column in range(self.kernel):
                tap = self.neighbours[row, column][None, None, None]
                grid = grid + padded[:, row : row + height, column : column + width] * tap
        return grid.reshape(x.shape)


class MaskGITModel(nn.Module):
    """Embeddings, trunk and the masked-token head."""

    options: MaskGITOptions
    layout: TokenLayout

    def setup(self):
        o, trunk = self.options, self.options.trunk
        self.embedding = MaskGITEmbedding(
            trunk, self.layout, o.embedding_scale, o.head_scale, o.tied_embeddings, o.neighbour_kernel
        )
        self.trunk = Trunk(trunk, self.layout, o.patterns)
        if o.head == "mlm":
            self.head = Dense((trunk.width,), (trunk.width,), ("embed", None), trunk.dtype, (None,))
            self.head_norm = Norm(trunk.norm, trunk.dtype)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        self.image_bias = self.param("image_bias", zeros, (self.layout.image_vocab,))

    def _logits(self, x: jax.Array) -> jax.Array:
        """Image states [B, N, D] to float32 [B, N, V]."""
        if self.options.head == "mlm":
            x = self.head_norm(jax.nn.gelu(self.head(x), approximate=False))
        return self.embedding.image_logits(x) + self.image_bias[None, None]

    def __call__(self, text: jax.Array, ids: jax.Array, train: bool = False) -> jax.Array:
        """int32 [B, T] and [B, N] (with `layout.mask_id` where masked) to logits, float32 [B, N, V]."""
        x = jnp.concatenate([self.embedding.text(text, train), self.embedding.image(ids, train)], axis=1)
        x = self.trunk(constrain(x, "batch", "length", "embed_act"), train)
        return self._logits(x[:, self.layout.text_length :])

    def prefill(self, text: jax.Array):
        """int32 [C, T] to each layer's text keys and values."""
        return self.trunk.prefill(self.embedding.text(text))[1]

    def refine(self, ids: jax.Array, text) -> jax.Array:
        """int32 [C·n, N] (with `layout.mask_id`) beside the captions of `prefill` to logits, float32 [C·n, N, V]."""
        return self._logits(self.trunk.refine(self.embedding.image(ids), text))


@dataclasses.dataclass(frozen=True)
class MaskGITPrior:
    """The `TokenPrior` that draws all tokens in a few steps.

    Attributes:
      layout: of the stream.
      options: of the model, its loss and its decoding.
    """

    layout: TokenLayout
    options: MaskGITOptions = MaskGITOptions()
    name = "maskgit"
    any_order = True
    schedules = {}

    @property
    def model(self) -> MaskGITModel:
        return MaskGITModel(self.options, self.layout)

    def init(self, key: jax.Array, codebook=None):
        """See `TokenPrior.init`."""
        text = jnp.zeros((1, self.layout.text_length), jnp.int32)
        tokens = jnp.zeros((1, self.layout.image_length), jnp.int32)
        params = self.model.init(key, text, tokens)["params"]
        start = codebook is not None and self.options.codebook_init
        return start_from_codebook(params, codebook, key) if start else params

    def mask_ratios(self, key: jax.Array, rows: int, *, train: bool) -> jax.Array:
        """r of each row, float32 [B]: U(0, 1), each its own draw; in evaluation one in each of B equal parts."""
        drawn = jax.random.uniform(key, (rows,))
        return drawn if train else (jnp.arange(rows) + drawn) / rows

    def loss(self, params, text: jax.Array, tokens: jax.Array, key: jax.Array, *, train: bool, valid=None, step=None):
        """See `TokenPrior.loss`. `image_nats` is the mean over masked tokens, without smoothing: not a likelihood."""
        o, lay, rows = self.options, self.layout, text.shape[0]
        drop_key, dropout_key, ratio_key, mask_key = jax.random.split(key, 4)
        given, _ = drop_captions(drop_key, text, o.caption_drop if train else 0.0, lay)
        counts = masking.training_counts(
            o.mask_schedule, self.mask_ratios(ratio_key, rows, train=train), lay.image_length
        )
        masked = masking.random_mask(mask_key, counts, lay.image_length)
        ids = jnp.where(masked, lay.mask_id, tokens)
        logits = self.model.apply({"params": params}, given, ids, train, rngs={"dropout": dropout_key})

        nats = cross_entropy(logits, tokens)
        smooth = (1 - o.label_smoothing) * nats + o.label_smoothing * uniform_cross_entropy(logits)
        counted = jnp.ones(rows) if valid is None else valid.astype(jnp.float32)
        weights = jnp.where(masked, 1.0, o.unmasked_weight) * counted[:, None]
        masked = masked * counted[:, None]
        share = counts / lay.image_length
        scalars = {
            "image_nats": mean_over(nats, masked),
            "image_accuracy": mean_over(logits.argmax(-1) == tokens, masked),
        }
        for i in range(BUCKETS):
            inside = (share > i / BUCKETS) & (share <= (i + 1) / BUCKETS)
            name = f"image_nats_masked_{100 * i // BUCKETS}_{100 * (i + 1) // BUCKETS}"
            weight = masked * inside[:, None]
            scalars[name] = jnp.where(weight.sum() > 0, mean_over(nats, weight), jnp.nan)
        return mean_over(smooth, weights), scalars

    def decoding_steps(self, steps: int | None) -> int:
        return steps or self.options.steps

    def sample(self, params, text, keys, *, known=None, negative=None, **options) -> jax.Array:
        """See `TokenPrior.sample`."""
        return self.trajectory(params, text, keys, known=known, negative=negative, **options)[0]

    def trajectory(self, params, text, keys, *, known=None, negative=None, **options) -> tuple[jax.Array, jax.Array]:
        """`sample`, with what stood there after each step.

        Returns:
          int32 [B, N], and int32 [steps, B, N] with `layout.mask_id` where a token was still masked.
        """
        options, o = SamplingOptions(**options), self.options
        choice = o.choice_temperature if options.choice_temperature is None else options.choice_temperature
        order = masking.unmasking_order(options.order or o.order, self.layout, choice)
        knobs = sampling.knobs(self.layout, text, keys, options, negative)
        return _decode(self, self.decoding_steps(options.steps), order, params, text, keys, known, knobs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(prior: MaskGITPrior, steps: int, order: masking.UnmaskingOrder, params, text, keys, known, knobs):
    """`trajectory`, traced: steps, order and which knobs are set are static, their values are not."""
    layout, o = prior.layout, prior.options
    params, flat = for_decoding(params, o)
    bound = functools.partial(MaskGITModel(flat, layout).apply, {"params": params})
    rows, shape = keys.shape[0], (keys.shape[0], layout.image_length)
    guided = "guidance" in knobs  # the null branch is more captions
    text_cache = bound(jnp.concatenate([text, knobs["negative"]]) if guided else text, method="prefill")

    ids = jnp.full(shape, layout.mask_id, jnp.int32)
    if known is not None:
        given, mask = (jnp.broadcast_to(x, shape) for x in known)
        ids = jnp.where(mask, given.astype(jnp.int32), ids)
    at_start = (ids == layout.mask_id).sum(-1)

    def body(ids, t):
        unknown, ratio = ids == layout.mask_id, (t + 1) / steps
        logits = bound(jnp.concatenate([ids, ids]) if guided else ids, text_cache, method="refine")
        if guided:
            logits = sampling.guide(logits[:rows], logits[rows:], knobs["guidance"] * ratio)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        draw_keys, noise_keys = jax.vmap(lambda key: jax.random.split(key), out_axes=1)(step_keys)
        drawn = sampling.choose(logits, draw_keys, knobs, t / max(steps - 1, 1))
        surprise = cross_entropy(logits, drawn)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (layout.image_length,)))(noise_keys)
        scores = jnp.where(unknown, order.scores(-surprise, noise, ratio), jnp.inf)
        left = masking.still_masked(o.mask_schedule, t, steps, at_start, unknown.sum(-1))
        masked = unknown & (masking.ranks(scores) < left[:, None])
        ids = jnp.where(masked, layout.mask_id, jnp.where(unknown, drawn, ids))
        return ids, ids

    return jax.lax.scan(body, ids, jnp.arange(steps))
