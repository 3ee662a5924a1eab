"""The autoregressive prior: text and image tokens as one stream (DALL-E, section 2.2).

Every position predicts the next one: text positions 0…T-2 the text, the last text position and the image positions
the image. The heads are split, so that only possible classes are computed: text tokens plus one class "padding here"
(at a position only its own padding id is possible), and image tokens. Loss: 1/8 text + 7/8 image cross-entropy, each
averaged over its own tokens.

Not settled by the paper, and so chosen here: no start token (the first text token is given, not predicted);
`tied_embeddings` reuses the image and text embeddings as heads (the 12-billion size counts them once).

With `order="random"` the image tokens follow in any order, each position told which cell it predicts next (RandAR,
arXiv 2412.01827; RAR, arXiv 2411.00776). The share of random orders may fall to zero during training, as in RAR.

    B rows    C captions    T text    N image tokens    D width    V image vocabulary    H heads    K head size
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from dalle_jax.distributed.sharding import constrain
from dalle_jax.errors import ConfigError
from dalle_jax.models.attention.patterns import CausalPattern, full_layers, sparse_layers
from dalle_jax.models.dense import outputs_first
from dalle_jax.models.transformer import TransformerOptions, Trunk, for_decoding
from dalle_jax.priors import orders, sampling
from dalle_jax.priors.embedding import StreamEmbedding, project, start_from_codebook
from dalle_jax.priors.losses import cross_entropy, drop_captions, mean_over
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.token_layout import TokenLayout

ATTENTION = ("sparse", "full")
ORDERS = ("raster", "random")


@dataclasses.dataclass(frozen=True)
class AutoregressiveOptions:
    """What the prior adds to its trunk.

    Attributes:
      trunk: sizes and choices of the transformer.
      attention: "sparse" (the paper's row, column, row, row, …, convolutional) or "full" (dense causal).
      kernel: of the convolutional layer.
      wrap: whether the convolutional window runs on across row ends.
      tied_embeddings: the heads are the embeddings, transposed.
      embedding_scale: standard deviation of the embeddings at initialisation.
      head_scale: the same of heads that are not tied.
      codebook_init: image embedding and head start as the tokenizer's codebook, see `start_from_codebook`.
      text_weight: share of the text in the loss, 1/8 in the paper.
      caption_drop: share of captions emptied in training, for guidance.
      order: "raster", or "random": with "full" attention and learned positions only.
      anneal_start, anneal_end: updates between which the share of random orders falls from 1 to 0; 0, 0 keeps it at 1.
    """

    trunk: TransformerOptions = TransformerOptions()
    attention: str = "sparse"
    kernel: int = 11
    wrap: bool = True
    tied_embeddings: bool = False
    embedding_scale: float = 0.02
    head_scale: float = 0.02
    codebook_init: bool = False
    text_weight: float = 1 / 8
    caption_drop: float = 0.1
    order: str = "raster"
    anneal_start: int = 0
    anneal_end: int = 0

    def __post_init__(self):
        for name, known in (("attention", ATTENTION), ("order", ORDERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; expected one of {', '.join(known)}.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"model.kernel is {self.kernel}; expected an odd number, the paper's being 11.")
        for name in ("text_weight", "caption_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1].")
        if self.order == "random" and (self.attention != "full" or self.trunk.positions != "learned"):
            raise ValueError(
                f"model.order is 'random' with attention={self.attention!r} and trunk.positions="
                f"{self.trunk.positions!r}: tokens in any order need attention='full' and positions='learned'."
            )
        if not 0 <= self.anneal_start <= self.anneal_end:
            raise ValueError(
                f"model.anneal_start is {self.anneal_start} and anneal_end {self.anneal_end}; expected 0 ≤ start ≤ end."
            )

    @property
    def patterns(self) -> tuple[CausalPattern, ...]:
        depth = self.trunk.depth
        return sparse_layers(depth, self.kernel, self.wrap) if self.attention == "sparse" else full_layers(depth)


class AutoregressiveEmbedding(StreamEmbedding):
    """Adds the text head, and "which cell comes next".

    Attributes:
      any_order: whether a position is told which cell it predicts.
    """

    any_order: bool

    def setup(self):
        super().setup()
        if not self.tied:
            self.text_head = self.table("text_head_kernel", self.layout.text_vocab + 1, scale=self.head_scale)
        if self.any_order:
            self.next_rows = self.table("next_rows", self.layout.height, "positions")
            self.next_columns = self.table("next_columns", self.layout.width, "positions")

    def next_cell(self, cells: jax.Array) -> jax.Array:
        """int32 [...] to [..., D]."""
        x = self.next_rows[cells // self.layout.width] + self.next_columns[cells % self.layout.width]
        return x.astype(self.trunk.dtype)

    def text_logits(self, x: jax.Array) -> jax.Array:
        """[..., D] to float32 [..., text_vocab + 1]."""
        if not self.tied:
            return project(x, self.text_head)
        # Tied: "padding here" is the mean padding embedding, so that all of them are trained by it.
        words, padding = jnp.split(self.text_table, [self.layout.text_vocab])
        return project(x, jnp.concatenate([words, padding.mean(0, keepdims=True)]))


class AutoregressiveModel(nn.Module):
    """Embeddings, trunk and heads. `cells`, int32 [B, N], is the order of the image tokens; None: raster."""

    options: AutoregressiveOptions
    layout: TokenLayout

    def setup(self):
        o, lay = self.options, self.layout
        self.embedding = AutoregressiveEmbedding(
            o.trunk, lay, o.embedding_scale, o.head_scale, o.tied_embeddings, o.order == "random"
        )
        self.trunk = Trunk(o.trunk, lay, o.patterns)

    def embed(self, text: jax.Array, tokens: jax.Array, train: bool = False, cells=None) -> jax.Array:
        """int32 [B, T] and [B, N], in the order of `cells`, to the stream's states, [B, S, D]."""
        x = [self.embedding.text(text, train), self.embedding.image(tokens, train, cells)]
        x = jnp.concatenate(x, axis=1)
        if cells is not None:
            x = x + jnp.pad(self.embedding.next_cell(cells), ((0, 0), (self.layout.text_length - 1, 1), (0, 0)))
        return constrain(x, "batch", "length", "embed_act")

    def logits(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Stream states to (text logits float32 [B, T-1, text_vocab + 1], image logits float32 [B, N, V])."""
        t = self.layout.text_length
        x = self.trunk(x, train)
        return self.embedding.text_logits(x[:, : t - 1]), self.embedding.image_logits(x[:, t - 1 : -1])

    def __call__(self, text: jax.Array, tokens: jax.Array, train: bool = False, cells=None):
        """int32 [B, T] and [B, N] to the logits of `logits`."""
        return self.logits(self.embed(text, tokens, train, cells), train)

    def prefill(self, text: jax.Array, first=None):
        """int32 [C, T] to the first image token's logits, float32 [C, V], and each layer's text keys and values.

        `first`, int32 [C], is the first cell, where the order is free.
        """
        x = self.embedding.text(text)
        if first is not None:
            x = x.at[:, -1].add(self.embedding.next_cell(first))
        x, cache = self.trunk.prefill(x)
        return self.embedding.image_logits(x[:, -1], decode_step=True), cache

    def init_cache(self, rows: int):
        return self.trunk.init_cache(rows)

    def step(self, tokens: jax.Array, index: jax.Array, cells: jax.Array, following: jax.Array, text, caches):
        """The `index`-th image token, int32 [B], to the logits of the one after it, float32 [B, V], and the caches.

        It stands at `cells`, int32 [B]; the one after it at `following`, int32 [B].
        """
        x = self.embedding.image_at(tokens, cells)
        if self.options.order == "random":
            x = x + self.embedding.next_cell(following)
        x, caches = self.trunk.step(x, text, caches, index)
        return self.embedding.image_logits(x, decode_step=True), caches


@dataclasses.dataclass(frozen=True)
class AutoregressivePrior:
    """The `TokenPrior` that predicts one token after the other.

    Attributes:
      layout: of the stream.
      options: of the model and its loss.
    """

    layout: TokenLayout
    options: AutoregressiveOptions = AutoregressiveOptions()
    name = "autoregressive"

    @property
    def any_order(self) -> bool:
        return self.options.order == "random"

    @property
    def schedules(self) -> dict[str, optax.Schedule]:
        o = self.options
        if o.order == "raster":
            return {}
        if not o.anneal_end:
            return {"random_orders": optax.constant_schedule(1.0)}
        return {"random_orders": optax.linear_schedule(1.0, 0.0, max(o.anneal_end - o.anneal_start, 1), o.anneal_start)}

    @property
    def model(self) -> AutoregressiveModel:
        return AutoregressiveModel(self.options, self.layout)

    def init(self, key: jax.Array, codebook=None):
        """See `TokenPrior.init`."""
        text = jnp.zeros((1, self.layout.text_length), jnp.int32)
        tokens = jnp.zeros((1, self.layout.image_length), jnp.int32)
        cells = tokens if self.any_order else None
        params = self.model.init(key, text, tokens, cells=cells)["params"]
        start = codebook is not None and self.options.codebook_init
        return start_from_codebook(params, codebook, key) if start else params

    def loss(self, params, text: jax.Array, tokens: jax.Array, key: jax.Array, *, train: bool, valid=None, step=None):
        """See `TokenPrior.loss`. Dropped captions do not count in the text loss. Evaluation is in raster order once
        the share of random orders is to fall to zero, otherwise in random ones."""
        rows = text.shape[0]
        drop_key, dropout_key = jax.random.split(key)
        given, dropped = drop_captions(drop_key, text, self.options.caption_drop if train else 0.0, self.layout)
        cells = None
        if self.any_order:
            share = 0.0 if self.options.anneal_end else 1.0
            if train and step is not None:
                share = self.schedules["random_orders"](step)
            cells = orders.mixed(jax.random.fold_in(key, 2), rows, self.layout, share)
            tokens = jnp.take_along_axis(tokens, cells, axis=1)
        text_logits, image_logits = self.model.apply(
            {"params": params}, given, tokens, train, cells, rngs={"dropout": dropout_key}
        )
        counted = jnp.ones(rows) if valid is None else valid.astype(jnp.float32)
        image_nats = mean_over(cross_entropy(image_logits, tokens).mean(-1), counted)
        if self.layout.text_length == 1:  # the only text token is given, so no text is predicted
            return image_nats, {"text_nats": jnp.float32(jnp.nan), "image_nats": image_nats}
        text_rows = cross_entropy(text_logits, self.layout.text_targets(text[:, 1:])).mean(-1)
        text_nats = mean_over(text_rows, counted * ~dropped)
        weight = self.options.text_weight
        loss = weight * text_nats + (1 - weight) * image_nats
        return loss, {"text_nats": text_nats, "image_nats": image_nats}

    def decoding_steps(self, steps: int | None) -> int:
        return self.layout.image_length

    def sample(self, params, text, keys, *, known=None, negative=None, **options) -> jax.Array:
        """See `TokenPrior.sample`. One jitted loop over the N positions; `order` is "raster" or, where the prior was
        trained for it, "random" or "halton": given tokens then come first, so that every other one sees them.

        Raises:
          ValueError: where the rows are not a multiple of the captions.
          ConfigError: an option that is another prior's.
        """
        options = SamplingOptions(**options)
        for name in ("steps", "choice_temperature"):
            if getattr(options, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(options, name)}: the autoregressive prior takes one step a token; leave it out."
                )
        order = options.order or ("raster" if self.options.anneal_end or not self.any_order else "random")
        if order not in (orders.NAMES if self.any_order else ("raster",)):
            expected = ", ".join(orders.NAMES) if self.any_order else "raster, as it was trained"
            raise ConfigError(f"order={order!r}: this prior draws in the order {expected}.")
        return _decode(
            self, order, params, text, keys, known, sampling.knobs(self.layout, text, keys, options, negative)
        )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(prior: AutoregressivePrior, order: str, params, text, keys, known, knobs) -> jax.Array:
    """`sample`, traced: which knobs are set is static, their values are not."""
    layout, o = prior.layout, prior.options
    params, flat = for_decoding(params, o)
    model = AutoregressiveModel(flat, layout)
    bound = functools.partial(model.apply, {"params": params})
    rows, length = keys.shape[0], layout.image_length
    cells = orders.cells(order, keys, layout)  # [B, N]
    first = None
    if prior.any_order:
        if known is not None:
            cells = orders.given_first(cells, known[1])
        text, first = jnp.repeat(text, rows // text.shape[0], axis=0), cells[:, 0]  # each row has its own first cell
    guided = "guidance" in knobs
    if guided:  # the null branch is more captions, with text and caches of its own
        negative = jnp.repeat(knobs["negative"], text.shape[0] // knobs["negative"].shape[0], axis=0)
        text = jnp.concatenate([text, negative])
    twice = (lambda x: jnp.concatenate([x, x])) if guided else (lambda x: x)

    def choose(logits, index):
        if guided:
            logits = sampling.guide(logits[:rows], logits[rows:], knobs["guidance"])
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        token = sampling.choose(logits, step_keys, knobs, index / max(length - 1, 1))
        if known is not None:
            given, mask = (jnp.take_along_axis(x, cells[:, index][:, None], axis=1)[:, 0] for x in known)
            token = jnp.where(mask, given.astype(jnp.int32), token)
        return token

    logits, text_cache = bound(text, None if first is None else twice(first), method="prefill")
    candidates = twice(keys).shape[0] // text.shape[0]
    caches = bound(candidates * text.shape[0], method="init_cache")
    trunk, restore = outputs_first(params["trunk"], o.trunk.dtype)

    def body(carry, index):
        logits, caches = carry
        stored = {"params": params | {"trunk": restore(trunk)}}
        token = choose(logits, index)
        here, following = twice(cells[:, index]), twice(cells[:, index + 1])
        logits, caches = model.apply(stored, twice(token), index, here, following, text_cache, caches, method="step")
        return (logits, caches), token

    start = (jnp.repeat(logits, candidates, axis=0), caches)
    (logits, _), tokens = jax.lax.scan(body, start, jnp.arange(length - 1))
    last = choose(logits, jnp.int32(length - 1))
    tokens = jnp.concatenate([tokens.T, last[:, None]], axis=1)
    return orders.to_raster(tokens, cells) if prior.any_order else tokens
