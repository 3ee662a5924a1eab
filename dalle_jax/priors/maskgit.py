"""The MaskGIT prior: a bidirectional transformer that predicts all masked image tokens at once (arXiv 2202.04200).

Training masks some tokens of an image and predicts them from the other tokens and the caption. Decoding starts with all
tokens masked and unmasks more of them in each of a few steps. By default guidance rises linearly over the steps (Muse,
arXiv 2301.00704, section 2.7). The paper's masked-token head is a dense layer, GELU, norm, the transposed image
embedding and a bias per token.

Deviations from the paper and from its reference code (google-research/maskgit):

* By default the blocks are pre-norm with a final norm, as in the autoregressive prior. The reference is a post-norm
  BERT (`trunk.norm_placement`, `final_norms`), which also normalises its embeddings (`embedding_norm`). Its epsilon is
  1e-12 (`norm_epsilon`), ours 1e-5. Its queries, keys and values have biases (`qkv_bias`).
* The condition is a caption, not a class. By default text positions do not attend to the image, so the text is computed
  once. In the reference the class is one more token, which attends to the image (`text_reads_image`).
* By default image positions are row + column embeddings, those of the reference a free table (`trunk.positions`). The
  reference has one table for tokens, classes and the mask, and its loss spreads label smoothing over all of them. Here
  logits and smoothing are over the image tokens alone.
* By default the head's GELU is exact. The reference's is the tanh approximation (`head_activation`).
* Masks have ⌊N·γ(r)⌋ tokens as in the reference code; the paper has ⌈N·γ(r)⌉. The released configuration also has
  `min_masking_rate=0.5`. The paper does not, and no released code reads it.
* `codebook_init`, `neighbour_kernel` and the head "linear" are options. On few images they learn much faster than the
  paper's model.
* `raster_steps` is an option. The paper masks random tokens (section 3.1) from the first update on. A model learns to
  predict tokens in a fixed order several times faster than in random orders. The first updates therefore may train
  the same parameters on p(token | caption, tokens before it in raster order), for all tokens in one pass.

    B rows    C captions    T text    N image tokens    S = T + N    D width    V image vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Shaped

from dalle_jax.models.trunk import for_decoding
from dalle_jax.priors import encoder, masking, sampling
from dalle_jax.priors.alternatives import one_of
from dalle_jax.priors.condition import blank
from dalle_jax.priors.embedding import start_from_codebook
from dalle_jax.priors.guidance import guide
from dalle_jax.priors.losses import cross_entropy, mean_over, training_conditions, uniform_cross_entropy
from dalle_jax.priors.maskgit_model import MaskGITModel, MaskGITOptions, truncated_start
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout

BUCKETS = 4  # of the share of masked tokens, each with its own metric


@dataclasses.dataclass(frozen=True)
class MaskGITPrior:
    """The `TokenPrior` that draws all tokens in a few steps.

    Attributes:
      layout: layout of the token stream.
      options: options of the model, its loss and its decoding.
    """

    layout: TokenLayout
    options: MaskGITOptions = MaskGITOptions()
    name = "maskgit"
    any_order = True
    takes_steps = True
    absent_options: ClassVar[Mapping[str, str]] = {}

    @property
    def stream(self) -> TokenLayout:
        """See `TokenPrior.stream`."""
        return encoder.stream(self.options, self.layout)

    @property
    def schedules(self) -> dict[str, optax.Schedule]:
        """See `TokenPrior.schedules`: with `raster_steps`, "raster_order" is 1 in those updates and 0 after them."""
        steps = self.options.raster_steps
        return {"raster_order": lambda step: jnp.where(step < steps, 1.0, 0.0)} if steps else {}

    @property
    def model(self) -> MaskGITModel:
        """The network."""
        return MaskGITModel(self.options, self.layout)

    def init(self, key: Key[Array, ""], codebook: Float[ArrayLike, "V E"] | None = None) -> PyTree:
        """See `TokenPrior.init`."""
        text = blank(self.layout.condition)
        tokens = jnp.zeros((1, self.layout.image_length), jnp.int32)
        params = self.model.init(key, text, tokens)["params"]
        if self.options.init_scale:
            params = truncated_start(params, key, self.options.init_scale)
        start = codebook is not None and self.options.codebook_init
        return start_from_codebook(params, codebook, key) if start else params

    def mask_ratios(
        self, key: Key[Array, ""], rows: int, *, train: bool, valid: Bool[ArrayLike, " B"] | None = None
    ) -> Float[Array, " B"]:
        """Draws r of each row, float32 [B]: U(0, 1) in training; one from each of equal intervals in evaluation.

        There are as many intervals as valid rows, so that a few images in a large batch cover all ratios.
        """
        drawn = jax.random.uniform(key, (rows,))
        if train:
            return drawn
        if valid is None:
            return (jnp.arange(rows) + drawn) / rows
        place = jnp.maximum(jnp.cumsum(valid) - 1, 0)
        return (place + drawn) / jnp.maximum(jnp.sum(valid), 1)

    def loss(
        self,
        params: PyTree,
        text: Shaped[ArrayLike, "B ..."],
        tokens: Int[ArrayLike, "B N"],
        key: Key[Array, ""],
        *,
        train: bool,
        valid: Bool[ArrayLike, " B"] | None = None,
        step: Int[ArrayLike, ""] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """See `TokenPrior.loss`. `image_nats` is the unsmoothed mean over masked tokens, which is not a likelihood.

        In the first `raster_steps` updates it is the mean over all tokens in raster order, which is one.
        """
        masked, batch = functools.partial(self._masked_loss, train=train), (text, tokens, valid)
        if not (train and self.options.raster_steps) or step is None:
            return masked(params, key, *batch)
        first = jnp.asarray(step) < self.options.raster_steps
        return one_of(first, self._raster_loss, masked, params, key, *batch)

    def _raster_loss(self, params, key, text, tokens, valid):
        """Implements `loss` in training with raster order: every token given the caption and the tokens before it."""
        drop_key, dropout_key = jax.random.split(key)
        given, _ = training_conditions(drop_key, text, self.options.caption_drop, self.layout.condition)
        model = MaskGITModel(self.options, self.layout, raster=True)
        logits = model.apply({"params": params}, given, tokens, True, rngs={"dropout": dropout_key})
        counted = jnp.ones(len(tokens)) if valid is None else valid.astype(jnp.float32)
        weights = jnp.broadcast_to(counted[:, None], tokens.shape)
        loss, nats = self._smoothed(logits, tokens, weights)
        return loss, _scalars(logits, tokens, nats, weights, jnp.zeros(len(tokens)))

    def _masked_loss(self, params, key, text, tokens, valid, *, train):
        """Implements `loss` with random masks (arXiv 2202.04200, section 3.1)."""
        o, lay, rows = self.options, self.layout, text.shape[0]
        drop_key, dropout_key, ratio_key, mask_key = jax.random.split(key, 4)
        given = text
        if train:
            given, _ = training_conditions(drop_key, text, o.caption_drop, lay.condition)
        counts = masking.training_counts(
            o.mask_schedule, self.mask_ratios(ratio_key, rows, train=train, valid=valid), lay.image_length
        )
        masked = masking.random_mask(mask_key, counts, lay.image_length)
        ids = jnp.where(masked, lay.mask_id, tokens)
        logits = self.model.apply({"params": params}, given, ids, train, rngs={"dropout": dropout_key})

        counted = jnp.ones(rows) if valid is None else valid.astype(jnp.float32)
        weights = jnp.where(masked, 1.0, o.unmasked_weight) * counted[:, None]
        loss, nats = self._smoothed(logits, tokens, weights)
        return loss, _scalars(logits, tokens, nats, masked * counted[:, None], counts / lay.image_length)

    def _smoothed(self, logits, tokens, weights):
        """Returns the weighted mean of the smoothed cross-entropy, and the unsmoothed nats, float32 [B, N]."""
        nats, share = cross_entropy(logits, tokens), self.options.label_smoothing
        smoothed = (1 - share) * nats + share * uniform_cross_entropy(logits)
        if self.options.loss_average == "images":
            of_images = jax.vmap(mean_over)(smoothed, weights)
            return mean_over(of_images, jnp.sign(weights.sum(-1))), nats  # rows of padding have no weight
        return mean_over(smoothed, weights), nats

    def decoding_steps(self, steps: int | None) -> int:
        """See `TokenPrior.decoding_steps`."""
        return steps or self.options.steps or (8 if self.layout.image_length <= 16 * 16 else 12)

    def sample(
        self,
        params: PyTree,
        text: Shaped[ArrayLike, "C ..."],
        keys: Key[Array, " B"],
        *,
        known: tuple[Int[ArrayLike, "B N"], Bool[ArrayLike, "B N"]] | None = None,
        negative: Shaped[ArrayLike, "_ ..."] | None = None,
        **options,
    ) -> Int[Array, "B N"]:
        """See `TokenPrior.sample`."""
        return self.trajectory(params, text, keys, known=known, negative=negative, **options)[0]

    def trajectory(
        self,
        params: PyTree,
        text: Shaped[ArrayLike, "C ..."],
        keys: Key[Array, " B"],
        *,
        known: tuple[Int[ArrayLike, "B N"], Bool[ArrayLike, "B N"]] | None = None,
        negative: Shaped[ArrayLike, "_ ..."] | None = None,
        **options,
    ) -> tuple[Int[Array, "B N"], Int[Array, "steps B N"]]:
        """Draws image tokens and returns the tokens after each step. Arguments as in `TokenPrior.sample`.

        Returns:
          Tokens, int32 [B, N]. Tokens after each step, int32 [steps, B, N], `layout.mask_id` where still masked.
        """
        options = SamplingOptions(**options)
        self.check_sampling(options)
        knobs = sampling.knobs(self.layout, text, keys, options, negative, guidance_schedule="linear")
        steps, order = self.decoding_steps(options.steps), self._order(options)
        return _decode(self, steps, order, params, text, keys, known, knobs)

    def watch(
        self,
        params: PyTree,
        text: Shaped[ArrayLike, "C ..."],
        keys: Key[Array, " B"],
        *,
        known: tuple[Int[ArrayLike, "B N"], Bool[ArrayLike, "B N"]] | None = None,
        negative: Shaped[ArrayLike, "_ ..."] | None = None,
        **options,
    ) -> Iterator[tuple[Array, float]]:
        """See `TokenPrior.watch`: yields after each decoding step."""
        options = SamplingOptions(**options)
        self.check_sampling(options)
        knobs = sampling.knobs(self.layout, text, keys, options, negative, guidance_schedule="linear")
        steps, order = self.decoding_steps(options.steps), self._order(options)
        ids, at_start, text_cache = _begin(self, params, text, keys, known, knobs)
        for t in range(steps):
            ids = _advance(self, steps, order, params, keys, knobs, at_start, text_cache, ids, np.int32(t))
            yield ids, (t + 1) / steps

    def _order(self, options: SamplingOptions) -> masking.UnmaskingOrder:
        """Returns the order in which tokens are decided."""
        o = self.options
        choice = o.choice_temperature if options.choice_temperature is None else options.choice_temperature
        return masking.unmasking_order(options.order or o.order, self.layout, choice)

    def check_sampling(self, options: SamplingOptions) -> None:
        """See `TokenPrior.check_sampling`."""
        sampling.check_options(options, self.layout, self.absent_options)
        masking.unmasking_order(options.order or self.options.order, self.layout, self.options.choice_temperature)


def _scalars(
    logits: Float[ArrayLike, "B N V"],
    tokens: Int[ArrayLike, "B N"],
    nats: Float[ArrayLike, "B N"],
    weights: Float[ArrayLike, "B N"],
    share: Float[ArrayLike, " B"],
) -> dict[str, Float[Array, ""]]:
    """Computes the metrics of a batch.

    Args:
      logits: float32 [B, N, V].
      tokens: int32 [B, N].
      nats: cross-entropy, float32 [B, N].
      weights: 1 for positions that count, else 0, float32 [B, N].
      share: share of masked tokens, float32 [B]. A row of share 0 counts in no bucket.

    Returns:
      float32 scalars; NaN for a bucket without rows.
    """
    scalars = {
        "image_nats": mean_over(nats, weights),
        "image_accuracy": mean_over(logits.argmax(-1) == tokens, weights),
    }
    for i in range(BUCKETS):
        inside = (share > i / BUCKETS) & (share <= (i + 1) / BUCKETS)
        name = f"image_nats_masked_{100 * i // BUCKETS}_{100 * (i + 1) // BUCKETS}"
        weight = weights * inside[:, None]
        scalars[name] = jnp.where(weight.sum() > 0, mean_over(nats, weight), jnp.nan)
    return scalars


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(prior: MaskGITPrior, steps: int, order: masking.UnmaskingOrder, params, text, keys, known, knobs):
    """Implements `trajectory`. Which keys `knobs` has is static; their values are traced."""
    bound = _bind(prior, params)
    ids, at_start, text_cache = _start(prior, bound, text, keys, known, knobs)
    step = _stepper(prior, steps, order, bound, keys, knobs, at_start, text_cache)

    def body(ids, t):
        ids = step(ids, t)
        return ids, ids

    return jax.lax.scan(body, ids, jnp.arange(steps))


@functools.partial(jax.jit, static_argnums=0)
def _begin(prior: MaskGITPrior, params, text, keys, known, knobs):
    """Implements the start of `watch`."""
    return _start(prior, _bind(prior, params), text, keys, known, knobs)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _advance(prior: MaskGITPrior, steps: int, order, params, keys, knobs, at_start, text_cache, ids, t):
    """Implements one step of `watch`. It is the body of a loop as in `_decode`, so that both are compiled alike."""
    step = _stepper(prior, steps, order, _bind(prior, params), keys, knobs, at_start, text_cache)
    return jax.lax.fori_loop(t, t + 1, lambda t, ids: step(ids, t), ids)


def _bind(prior: MaskGITPrior, params: PyTree) -> Callable[..., Array]:
    """Returns the model with its parameters, in the layout for decoding."""
    params, flat = for_decoding(params, prior.options)
    return functools.partial(MaskGITModel(flat, prior.layout).apply, {"params": params})


def _start(prior: MaskGITPrior, bound: Callable[..., Array], text, keys, known, knobs):
    """Returns the tokens before the first step, int32 [B, N], the number of masked ones, [B], and the cached text."""
    layout, shape = prior.layout, (keys.shape[0], prior.layout.image_length)
    guided = "guidance" in knobs  # the null branch runs as additional captions
    text_cache = bound(jnp.concatenate([text, knobs["negative"]]) if guided else text, method="prefill")
    ids = jnp.full(shape, layout.mask_id, jnp.int32)
    if known is not None:
        given, mask = (jnp.broadcast_to(x, shape) for x in known)
        ids = jnp.where(mask, given.astype(jnp.int32), ids)
    return ids, (ids == layout.mask_id).sum(-1), text_cache


def _stepper(prior: MaskGITPrior, steps: int, order, bound: Callable[..., Array], keys, knobs, at_start, text_cache):
    """Returns the function of one step: maps the tokens before step t, int32 [B, N], and t to those after it."""
    layout, guided = prior.layout, "guidance" in knobs
    rows = keys.shape[0]

    def step(ids, t):
        unknown, ratio = ids == layout.mask_id, (t + 1) / steps
        states = bound(jnp.concatenate([ids, ids]) if guided else ids, text_cache, method="states")
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
        draw_keys, noise_keys = jax.vmap(lambda key: jax.random.split(key), out_axes=1)(step_keys)

        def decide(states, uniform):
            logits = bound(states, method="logits")
            if guided:
                logits = guide(logits[:rows], logits[rows:], knobs["guidance"].at(ratio))
            drawn = sampling.choose_at(logits, uniform, knobs, t / max(steps - 1, 1))
            return drawn, cross_entropy(logits, drawn)

        uniform = sampling.uniforms(draw_keys, ids.shape[1:])
        drawn, surprise = sampling.in_parts(decide, layout.image_vocab, states, uniform)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (layout.image_length,)))(noise_keys)
        scores = jnp.where(unknown, order.scores(-surprise, noise, ratio), jnp.inf)
        left = masking.still_masked(prior.options.mask_schedule, t, steps, at_start, unknown.sum(-1))
        masked = unknown & (masking.ranks(scores) < left[:, None])
        return jnp.where(masked, layout.mask_id, jnp.where(unknown, drawn, ids))

    return step
