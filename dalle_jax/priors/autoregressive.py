"""The autoregressive prior: predicts text and image tokens as one stream (DALL-E, section 2.2).

Each position predicts the next one. Text and image have separate heads, so that only possible classes are computed. All
padding ids share one class of the text head. The loss is 1/8 of the text's mean cross-entropy plus 7/8 of the image's.

With `start_tokens` the stream is the paper's (section 2.2, figure 10): start-of-text, T text tokens, start-of-image, N
image tokens. Start-of-text predicts the first text token, start-of-image the first image token, and the last text token
predicts nothing. The text loss then counts all T tokens, so that the prior is a model of whole captions. Without
`start_tokens` the first text token is given, and the last one predicts the first image token.

`tied_embeddings` reuses the embeddings as heads. The paper has separate unembeddings (appendix D.2).

With `order="random"` image tokens follow in any order, and each position knows which cell it predicts next (RandAR,
arXiv 2412.01827; RAR, arXiv 2411.00776). The share of random orders may fall to zero during training, as in RAR. With
`order="diagonal"` anti-diagonals follow each other (NAR, arXiv 2503.10696), and the cells of each one can be drawn
together.

    B rows    C captions    T text    N image tokens    V image vocabulary    E codebook width
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Shaped

from dalle_jax.errors import ConfigError
from dalle_jax.models.attention.decode_cache import (
    Caches,
    ColumnCache,
    RingCache,
    for_stage,
    scan_in_stages,
    stages,
)
from dalle_jax.models.dense import outputs_first
from dalle_jax.models.trunk import for_decoding
from dalle_jax.priors import groups, orders, sampling
from dalle_jax.priors.autoregressive_model import AutoregressiveModel, AutoregressiveOptions
from dalle_jax.priors.condition import blank
from dalle_jax.priors.embedding import start_from_codebook
from dalle_jax.priors.guidance import guide
from dalle_jax.priors.losses import cross_entropy, mean_over, training_conditions
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.pytree import PyTree
from dalle_jax.token_layout import TokenLayout


@dataclasses.dataclass(frozen=True)
class AutoregressivePrior:
    """The `TokenPrior` that predicts one token after another.

    Attributes:
      layout: layout of the token stream.
      options: options of the model and its loss.
    """

    layout: TokenLayout
    options: AutoregressiveOptions = AutoregressiveOptions()
    name = "autoregressive"

    @property
    def stream(self) -> TokenLayout:
        """See `TokenPrior.stream`."""
        return self.options.stream(self.layout)

    @property
    def any_order(self) -> bool:
        """See `TokenPrior.any_order`: true for a prior of random orders."""
        return self.options.order == "random"

    @property
    def takes_steps(self) -> bool:
        """See `TokenPrior.takes_steps`: true if positions know the next cell."""
        return self.options.knows_next

    @property
    def absent_options(self) -> dict[str, str]:
        """See `TokenPrior.absent_options`."""
        absent = {
            "choice_temperature": "is an option of the MaskGIT prior; the autoregressive prior draws each token once. "
            "Leave it out."
        }
        if not self.takes_steps:
            absent["steps"] = (
                "draws several tokens in a step, but this prior knows only raster order, one token after another. "
                "Leave steps out, or train a prior with --config.model.order=diagonal or random."
            )
        return absent

    @property
    def schedules(self) -> dict[str, optax.Schedule]:
        """See `TokenPrior.schedules`: "random_orders", the share of random orders, if there are any."""
        o = self.options
        if not self.any_order:
            return {}
        falling = optax.constant_schedule(1.0)
        if o.anneal_end:
            falling = optax.linear_schedule(1.0, 0.0, max(o.anneal_end - o.anneal_start, 1), o.anneal_start)
        return {"random_orders": lambda step: jnp.where(step < o.raster_steps, 0.0, falling(step))}

    @property
    def model(self) -> AutoregressiveModel:
        """The network."""
        return AutoregressiveModel(self.options, self.layout)

    def init(self, key: Key[Array, ""], codebook: Float[ArrayLike, "V E"] | None = None) -> PyTree:
        """See `TokenPrior.init`."""
        text = blank(self.layout.condition)
        tokens = jnp.zeros((1, self.layout.image_length), jnp.int32)
        cells = tokens if self.options.knows_next else None
        params = self.model.init(key, text, tokens, cells=cells)["params"]
        start = codebook is not None and self.options.codebook_init
        return start_from_codebook(params, codebook, key) if start else params

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
        """See `TokenPrior.loss`. Dropped captions do not count in the text loss.

        Evaluation uses raster order if the share of random orders ends at zero, and random orders otherwise.
        """
        rows = text.shape[0]
        drop_key, dropout_key = jax.random.split(key)
        given, dropped = jnp.asarray(text), jnp.zeros(rows, bool)
        if train:
            given, dropped = training_conditions(drop_key, text, self.options.caption_drop, self.layout.condition)
        cells = self._training_orders(jax.random.fold_in(key, 2), rows, train, step)
        if cells is not None:
            tokens = jnp.take_along_axis(tokens, cells, axis=1)
        text_logits, image_logits = self.model.apply(
            {"params": params}, given, tokens, train, cells, rngs={"dropout": dropout_key}
        )
        counted = jnp.ones(rows) if valid is None else valid.astype(jnp.float32)
        image_nats = mean_over(cross_entropy(image_logits, tokens).mean(-1), counted)
        predicted = self.options.predicted_text(self.layout)
        if text_logits is None:
            return image_nats, {"image_nats": image_nats}
        if not predicted:  # the only text token is given
            return image_nats, {"text_nats": jnp.float32(jnp.nan), "image_nats": image_nats}
        text_rows = cross_entropy(text_logits, self.options.text_targets(self.layout, text[:, -predicted:])).mean(-1)
        text_nats = mean_over(text_rows, counted * ~dropped)
        weight = self.options.text_weight
        loss = weight * text_nats + (1 - weight) * image_nats
        return loss, {"text_nats": text_nats, "image_nats": image_nats}

    def _training_orders(self, key, rows, train, step):
        """Draws the orders of a batch, int32 [B, N], or returns None for raster order."""
        o = self.options
        if o.order == "diagonal":
            return orders.shuffled_diagonals(key, rows, self.layout)
        if o.order == "raster":
            return None
        share = 0.0 if o.anneal_end else 1.0
        if train and step is not None:
            share = self.schedules["random_orders"](step)
        return orders.mixed(key, rows, self.layout, share)

    def decoding_steps(self, steps: int | None) -> int:
        """See `TokenPrior.decoding_steps`: N, one step per token, by default."""
        return steps or self.layout.image_length

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
        """See `TokenPrior.sample`. Runs one jitted loop over the N positions, or over `steps` groups of them.

        The option `order` is that of training, or any of `orders.NAMES` for a prior of random orders. If positions know
        the next cell, known tokens come first, so that all other tokens depend on them. With `steps`, which needs such
        a prior, `groups.decode` draws several tokens in a step.

        Raises:
          ValueError: B is not a multiple of C.
          ConfigError: an option that the autoregressive prior does not have, or that this one was not trained for.
        """
        options = SamplingOptions(**options)
        self.check_sampling(options)
        order = options.order or self._default_order(options.steps)
        knobs = sampling.knobs(self.layout, text, keys, options, negative)
        if options.steps is None:
            return _decode(self, order, params, text, keys, known, knobs)
        return groups.decode(self.options, self.layout, order, options.steps, params, text, keys, known, knobs)

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
        """See `TokenPrior.watch`: yields after every w tokens, which are a row of the grid in raster order.

        With `steps`, it yields once, at the end.
        """
        given, options = options, SamplingOptions(**options)
        self.check_sampling(options)
        if options.steps is not None:
            yield self.sample(params, text, keys, known=known, negative=negative, **given), 1.0
            return
        order = options.order or self._default_order(None)
        knobs = sampling.knobs(self.layout, text, keys, options, negative)
        cells, text_cache, state, tokens = _begin(self, order, params, text, keys, known, knobs)
        fixed = params, keys, known, knobs, cells, text_cache
        length, width, shift = self.layout.image_length, self.layout.width, int(self.options.shifted)
        for begin, end, slots in stages(_stores(self), length - 1 + shift, shift):
            state = state[0], for_stage(state[1], _stores(self), length - 1 + shift, slots)
            while begin < end:
                stop = min(end, begin + width - (begin - shift) % width)
                state, tokens = _advance(self, *fixed, state, tokens, np.int32(begin), np.int32(stop))
                if (stop - shift) % width == 0:
                    yield _in_raster(self, tokens, cells), (stop - shift) / length
                begin = stop
        yield _end(self, keys, known, knobs, cells, state[0][0], tokens), 1.0

    def check_sampling(self, options: SamplingOptions) -> None:
        """See `TokenPrior.check_sampling`."""
        sampling.check_options(options, self.layout, self.absent_options)
        names = orders.NAMES if self.any_order else (self.options.order,)
        if options.order is not None and options.order not in names:
            expected = ", ".join(names) if self.any_order else f"{names[0]}, the order of training"
            raise ConfigError(f"order={options.order!r}; expected {expected}.")

    def _default_order(self, steps: int | None) -> str:
        """Returns the order in which tokens are drawn by default."""
        if not self.any_order:
            return self.options.order
        if steps is not None:
            return "halton"  # tokens that are drawn together are far apart
        return "raster" if self.options.anneal_end else "random"


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(prior: AutoregressivePrior, order: str, params, text, keys, known, knobs) -> Array:
    """Implements `sample`. Which keys `knobs` has is static; their values are traced."""
    model, params = _model_for_decoding(prior, params)
    cells, text_cache, start = _start(prior, model, params, order, text, keys, known, knobs)
    choose = _chooser(prior, keys, known, knobs, cells)
    body = _stepper(prior, model, params, keys, knobs, cells, text_cache, choose)
    length, shift = prior.layout.image_length, int(prior.options.shifted)
    ((logits, _), _), tokens = scan_in_stages(body, start, _stores(prior), length - 1 + shift, shift)
    last = choose(logits, jnp.int32(length - 1))
    return _in_raster(prior, jnp.concatenate([tokens.T, last[:, None]], axis=1), cells)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _begin(prior: AutoregressivePrior, order: str, params, text, keys, known, knobs):
    """Implements the start of `watch`: what `_start` returns, and the tokens [B, N] in the order of drawing."""
    model, params = _model_for_decoding(prior, params)
    cells, text_cache, start = _start(prior, model, params, order, text, keys, known, knobs)
    tokens = jnp.full(cells.shape, prior.layout.mask_id, jnp.int32)
    if known is not None:
        given, mask = (jnp.take_along_axis(jnp.broadcast_to(x, cells.shape), cells, axis=1) for x in known)
        tokens = jnp.where(mask, given.astype(jnp.int32), tokens)
    return cells, text_cache, start, tokens


@functools.partial(jax.jit, static_argnums=0)
def _advance(
    prior: AutoregressivePrior, params, keys, known, knobs, cells, text_cache, state, tokens, first, end
) -> tuple[tuple[PyTree, Caches], Array]:
    """Implements a piece of `watch`: the positions from `first` to `end`, int32 scalars, as a loop like `_decode`'s."""
    model, params = _model_for_decoding(prior, params)
    choose = _chooser(prior, keys, known, knobs, cells)
    body = _stepper(prior, model, params, keys, knobs, cells, text_cache, choose)

    def draw(position, carry):
        state, token = body(carry[0], position)
        index = position - int(prior.options.shifted)
        return state, jax.lax.dynamic_update_slice_in_dim(carry[1], token[:, None], index, axis=1)

    return jax.lax.fori_loop(first, end, draw, (state, tokens))


@functools.partial(jax.jit, static_argnums=0)
def _end(prior: AutoregressivePrior, keys, known, knobs, cells, logits, tokens) -> Array:
    """Implements the end of `watch`: draws the last token."""
    last = _chooser(prior, keys, known, knobs, cells)(logits, jnp.int32(prior.layout.image_length - 1))
    return _in_raster(prior, tokens.at[:, -1].set(last), cells)


def _in_raster(prior: AutoregressivePrior, tokens, cells) -> Array:
    """Returns the tokens, int32 [B, N], in raster order."""
    return orders.to_raster(tokens, cells) if prior.options.knows_next else tokens


def _stores(prior: AutoregressivePrior) -> list[RingCache | ColumnCache]:
    """Returns how each layer's cache is stored."""
    return [pattern.cache(prior.stream) for pattern in prior.options.patterns]


def _model_for_decoding(prior: AutoregressivePrior, params: PyTree) -> tuple[AutoregressiveModel, PyTree]:
    """Returns the model and its parameters in the layout for decoding."""
    params, flat = for_decoding(params, prior.options)
    return AutoregressiveModel(flat, prior.layout), params


def _start(prior: AutoregressivePrior, model: AutoregressiveModel, params, order: str, text, keys, known, knobs):
    """Runs over the text.

    Returns:
      Cells in the order of drawing, int32 [B, N], the cached text, and the state of `_stepper`.
    """
    rows, guided, first = keys.shape[0], "guidance" in knobs, None
    cells = orders.cells(order, keys, prior.layout)
    if prior.options.knows_next:
        if known is not None:
            cells = orders.given_first(cells, known[1])
        text, first = jnp.repeat(text, rows // text.shape[0], axis=0), cells[:, 0]  # rows differ in their first cell
    if guided:  # the null branch runs as additional captions
        negative = jnp.repeat(knobs["negative"], text.shape[0] // knobs["negative"].shape[0], axis=0)
        text = jnp.concatenate([text, negative])
    twice = _twice(guided)
    first = None if first is None else twice(first)
    logits, text_cache, caches = model.apply({"params": params}, text, twice(keys).shape[0], first, method="start")
    drawn = jnp.zeros(cells.shape, jnp.int32) if prior.options.neighbour_kernel else None
    return cells, text_cache, ((logits, drawn), caches)


def _chooser(prior: AutoregressivePrior, keys, known, knobs, cells) -> Callable[[Array, Array], Array]:
    """Returns the function that draws the token at an index of the order from its logits."""
    rows, length = keys.shape[0], prior.layout.image_length

    def choose(logits, index):
        if "guidance" in knobs:
            logits = guide(logits[:rows], logits[rows:], knobs["guidance"].at((index + 1) / length))
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        token = sampling.choose(logits, step_keys, knobs, index / max(length - 1, 1))
        if known is not None:
            given, mask = (jnp.take_along_axis(x, cells[:, index][:, None], axis=1)[:, 0] for x in known)
            token = jnp.where(mask, given.astype(jnp.int32), token)
        return token

    return choose


def _stepper(prior: AutoregressivePrior, model: AutoregressiveModel, params, keys, knobs, cells, text_cache, choose):
    """Returns the body of the loop: draws the token at a position and runs the model over it.

    Its state is ((logits, drawn), caches): logits of the next token, the tokens drawn so far, int32 [B, N] in the order
    of drawing, and the caches. Without `neighbour_kernel`, `drawn` is None.
    """
    twice, o = _twice("guidance" in knobs), prior.options
    trunk, restore = outputs_first(params["trunk"], o.trunk.dtype)
    shift = int(o.shifted)  # the image token at `index` stands at this many positions after it
    places = jnp.argsort(cells, axis=1)

    def look_around(drawn, token, index):
        """Adds a token to those drawn so far, and returns the known tokens around the next cell as well."""
        drawn = jax.lax.dynamic_update_slice_in_dim(drawn, token[:, None], index, axis=1)
        asked, seen = cells[:, index + 1][:, None], (index + 1)[None, None]
        return drawn, twice(orders.neighbours(drawn, places, asked, seen, o.neighbour_kernel, prior.layout)[:, 0])

    def body(carry, position):
        ((logits, drawn), caches), index = carry, position - shift
        stored = {"params": params | {"trunk": restore(trunk)}}
        token, around = choose(logits, index), None
        if o.neighbour_kernel:
            drawn, around = look_around(drawn, token, index)
        here, following = twice(cells[:, index]), twice(cells[:, index + 1])
        given = stored, twice(token), index, here, following, text_cache, caches, around
        logits, caches = model.apply(*given, method="step")
        return ((logits, drawn), caches), token

    return body


def _twice(guided: bool) -> Callable[[Array], Array]:
    """Returns the function that repeats the rows for the null branch of guidance."""
    return (lambda x: jnp.concatenate([x, x])) if guided else (lambda x: x)
