"""The autoregressive prior: text and image tokens as one stream (DALL-E, section 2.2).

Every position predicts the next one: text positions 0…T-2 the text, the last text position and the image positions
the image. The heads are split, so that only possible classes are computed: text tokens plus one class "padding here"
(at a position only its own padding id is possible), and image tokens. Loss: 1/8 text + 7/8 image cross-entropy, each
averaged over its own tokens.

Not settled by the paper, and so chosen here: no start token (the first text token is given, not predicted);
`tied_embeddings` reuses the image and text embeddings as heads (the 12-billion size counts them once).

    B rows    C captions    T text    N image tokens    D width    V image vocabulary    H heads    K head size
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.layout import TokenLayout
from dalle_jax.models.attention import Pattern, full_layers, sparse_layers
from dalle_jax.models.dense import outputs_first, rows_product
from dalle_jax.models.transformer import TransformerOptions, Trunk, unstack
from dalle_jax.parallel import constrain
from dalle_jax.priors import sampling

ATTENTION = ("sparse", "full")


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
      text_weight: share of the text in the loss, 1/8 in the paper.
      caption_drop: share of captions emptied in training, for guidance.
    """

    trunk: TransformerOptions = TransformerOptions()
    attention: str = "sparse"
    kernel: int = 11
    wrap: bool = True
    tied_embeddings: bool = False
    embedding_scale: float = 0.02
    text_weight: float = 1 / 8
    caption_drop: float = 0.1

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise ValueError(f"model.attention is {self.attention!r}; expected one of {', '.join(ATTENTION)}.")
        for name in ("text_weight", "caption_drop"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1].")

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        depth = self.trunk.depth
        return sparse_layers(depth, self.kernel, self.wrap) if self.attention == "sparse" else full_layers(depth)


class StreamEmbedding(nn.Module):
    """Token and position embeddings of both parts, and the heads that read the states back as logits."""

    options: AutoregressiveOptions
    layout: TokenLayout

    def setup(self):
        o, lay = self.options, self.layout
        width = o.trunk.width

        def table_of(name: str, rows: int, axis: str, scale: float = o.embedding_scale) -> jax.Array:
            table = nn.with_logical_partitioning(nn.initializers.normal(scale), (axis, "embed"))
            return self.param(name, table, (rows, width))

        self.text_table = table_of("text", lay.text_ids, "vocab")
        self.image_table = table_of("image", lay.image_vocab, "vocab")
        if o.trunk.positions == "learned":
            self.text_positions = table_of("text_positions", lay.text_length, "positions")
            self.rows = table_of("rows", lay.height, "positions")
            self.columns = table_of("columns", lay.width, "positions")
        if not o.tied_embeddings:
            self.text_head = table_of("text_head_kernel", lay.text_vocab + 1, "vocab", 0.02)
            self.image_head = table_of("image_head_kernel", lay.image_vocab, "vocab", 0.02)
        self.drop = nn.Dropout(o.trunk.dropout)

    def _cast(self, x: jax.Array, train: bool) -> jax.Array:
        return self.drop(x, deterministic=not train).astype(self.options.trunk.dtype)

    def text(self, text: jax.Array, train: bool = False) -> jax.Array:
        """int32 [B, T] to [B, T, D]."""
        x = self.text_table[text]
        if self.options.trunk.positions == "learned":
            x = x + self.text_positions[None]
        return self._cast(x, train)

    def image(self, tokens: jax.Array, train: bool = False) -> jax.Array:
        """int32 [B, N] to [B, N, D]."""
        x = self.image_table[tokens]
        if self.options.trunk.positions == "learned":
            x = x + (self.rows[:, None] + self.columns[None]).reshape(1, self.layout.image_length, -1)
        return self._cast(x, train)

    def image_at(self, tokens: jax.Array, position: jax.Array) -> jax.Array:
        """int32 [B] at one image position, int32 [], to [B, D]."""
        x = self.image_table[tokens]
        if self.options.trunk.positions == "learned":
            x = x + (self.rows[position // self.layout.width] + self.columns[position % self.layout.width])[None]
        return self._cast(x, False)

    def text_logits(self, x: jax.Array) -> jax.Array:
        """[..., D] to float32 [..., text_vocab + 1]."""
        if not self.options.tied_embeddings:
            return _project(x, self.text_head)
        # Tied: "padding here" is the mean padding embedding, so that all of them are trained by it.
        words, padding = jnp.split(self.text_table, [self.layout.text_vocab])
        return _project(x, jnp.concatenate([words, padding.mean(0, keepdims=True)]))

    def image_logits(self, x: jax.Array) -> jax.Array:
        """[..., D] to float32 [..., V]."""
        return _project(x, self.image_table if self.options.tied_embeddings else self.image_head)


def _project(x: jax.Array, table: jax.Array) -> jax.Array:
    if x.ndim == 2:
        return rows_product(x, table.astype(x.dtype), preferred_element_type=jnp.float32)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, table.astype(x.dtype), contract, preferred_element_type=jnp.float32)


class AutoregressiveModel(nn.Module):
    """Embeddings, trunk and heads."""

    options: AutoregressiveOptions
    layout: TokenLayout

    def setup(self):
        o = self.options
        self.embedding = StreamEmbedding(o, self.layout)
        self.trunk = Trunk(o.trunk, self.layout, o.patterns)

    def embed(self, text: jax.Array, tokens: jax.Array, train: bool = False) -> jax.Array:
        """int32 [B, T] and [B, N] to the stream's states, [B, S, D]."""
        x = jnp.concatenate([self.embedding.text(text, train), self.embedding.image(tokens, train)], axis=1)
        return constrain(x, "batch", "length", "embed_act")

    def logits(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Stream states to (text logits float32 [B, T-1, text_vocab + 1], image logits float32 [B, N, V])."""
        t = self.layout.text_length
        x = self.trunk(x, train)
        return self.embedding.text_logits(x[:, : t - 1]), self.embedding.image_logits(x[:, t - 1 : -1])

    def __call__(self, text: jax.Array, tokens: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """int32 [B, T] and [B, N] to the logits of `logits`."""
        return self.logits(self.embed(text, tokens, train), train)

    def prefill(self, text: jax.Array):
        """int32 [C, T] to the first image token's logits, float32 [C, V], and each layer's text keys and values."""
        x, cache = self.trunk.prefill(self.embedding.text(text))
        return self.embedding.image_logits(x[:, -1]), cache

    def init_cache(self, rows: int):
        return self.trunk.init_cache(rows)

    def step(self, tokens: jax.Array, position: jax.Array, text, caches):
        """The token at `position`, int32 [B], to the logits of the one after it, float32 [B, V], and the caches."""
        x, caches = self.trunk.step(self.embedding.image_at(tokens, position), text, caches, position)
        return self.embedding.image_logits(x), caches


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-ln softmax(logits)[targets], in float32. [..., V] and int32 [...] to float32 [...].

    Picks by comparison, not by gather: the gather's gradient is a scatter over all logits.
    """
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    picked = jnp.where(classes == targets[..., None], logits, 0).sum(-1)
    return jax.nn.logsumexp(logits, axis=-1) - picked


def _mean_over(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Weighted mean of [B] by [B]; 0 where all weights are 0."""
    return (rows * weights).sum() / jnp.maximum(weights.sum(), 1)


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
    any_order = False

    @property
    def model(self) -> AutoregressiveModel:
        return AutoregressiveModel(self.options, self.layout)

    def init(self, key: jax.Array):
        text = jnp.zeros((1, self.layout.text_length), jnp.int32)
        tokens = jnp.zeros((1, self.layout.image_length), jnp.int32)
        return self.model.init(key, text, tokens)["params"]

    def loss(self, params, text: jax.Array, tokens: jax.Array, key: jax.Array, *, train: bool, valid=None):
        """See `TokenPrior.loss`. Dropped captions do not count in the text loss."""
        drop_key, dropout_key = jax.random.split(key)
        rate = self.options.caption_drop if train else 0.0
        dropped = jax.random.bernoulli(drop_key, rate, (text.shape[0], 1))
        given = jnp.where(dropped, jnp.asarray(self.layout.null_text())[None], text)
        text_logits, image_logits = self.model.apply(
            {"params": params}, given, tokens, train, rngs={"dropout": dropout_key}
        )
        counted = jnp.ones(text.shape[0]) if valid is None else valid.astype(jnp.float32)
        text_rows = cross_entropy(text_logits, self.layout.text_targets(text[:, 1:])).mean(-1)
        text_nats = _mean_over(text_rows, counted * ~dropped[:, 0])
        image_nats = _mean_over(cross_entropy(image_logits, tokens).mean(-1), counted)
        weight = self.options.text_weight
        loss = weight * text_nats + (1 - weight) * image_nats
        return loss, {"text_nats": text_nats, "image_nats": image_nats}

    def sample(
        self, params, text, keys, *, known=None, guidance=0.0, temperature=1.0, top_k=None, top_p=None, steps=None
    ) -> jax.Array:
        """See `TokenPrior.sample`. One jitted loop over the N positions.

        Raises:
          ValueError: where the rows are not a multiple of the captions, or `steps` is given.
        """
        if steps is not None:
            raise ValueError(f"steps={steps}: the autoregressive prior takes one step a token; leave steps out.")
        captions, rows = text.shape[0], keys.shape[0]
        if rows % captions:
            raise ValueError(f"{rows} keys for {captions} captions: expected the same number of candidates for each.")
        knobs = {"temperature": jnp.float32(temperature)}
        knobs |= {"guidance": jnp.float32(guidance)} if guidance else {}
        knobs |= {"top_k": jnp.float32(top_k)} if top_k is not None else {}
        knobs |= {"top_p": jnp.float32(top_p)} if top_p is not None else {}
        return _decode(self, params, text, keys, known, knobs)


@functools.partial(jax.jit, static_argnums=0)
def _decode(prior: AutoregressivePrior, params, text, keys, known, knobs) -> jax.Array:
    """`sample`, traced: which knobs are set is static, their values are not."""
    layout, o = prior.layout, prior.options
    # Each layer's weights in one piece, cut out of the scan's stack once and not at every token.
    params = params | {"trunk": unstack(params["trunk"], o.patterns)}
    flat = dataclasses.replace(o, trunk=dataclasses.replace(o.trunk, scan=False, remat="none"))
    model = AutoregressiveModel(flat, layout)
    bound = functools.partial(model.apply, {"params": params})
    rows, length = keys.shape[0], layout.image_length
    candidates = rows // text.shape[0]
    guided = "guidance" in knobs
    if guided:  # the null branch is more captions, with text and caches of its own
        text = jnp.concatenate([text, jnp.broadcast_to(jnp.asarray(layout.null_text()), text.shape)])

    def choose(logits, position):
        if guided:
            logits = sampling.guide(logits[:rows], logits[rows:], knobs["guidance"])
        temperature = knobs["temperature"]
        logits = logits / jnp.where(temperature > 0, temperature, 1.0)
        logits = sampling.filter_logits(logits, top_k=knobs.get("top_k"), top_p=knobs.get("top_p"))
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, position)
        token = sampling.draw(logits, step_keys, jnp.where(temperature > 0, 1.0, 0.0))
        if known is not None:
            given, mask = (jax.lax.dynamic_index_in_dim(x, position, axis=1, keepdims=False) for x in known)
            token = jnp.where(mask, given.astype(jnp.int32), token)
        return token

    first, text_cache = bound(text, method="prefill")
    caches = bound(candidates * text.shape[0], method="init_cache")

    trunk, restore = outputs_first(params["trunk"], o.trunk.dtype)

    def body(carry, position):
        logits, caches = carry
        stored = {"params": params | {"trunk": restore(trunk)}}
        token = choose(logits, position)
        fed = jnp.concatenate([token, token]) if guided else token
        logits, caches = model.apply(stored, fed, position, text_cache, caches, method="step")
        return (logits, caches), token

    start = (jnp.repeat(first, candidates, axis=0), caches)
    (logits, _), tokens = jax.lax.scan(body, start, jnp.arange(length - 1))
    last = choose(logits, jnp.int32(length - 1))
    return jnp.concatenate([tokens.T, last[:, None]], axis=1)
