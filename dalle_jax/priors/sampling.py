"""Sampling of tokens from logits: temperature, top-k, top-p, and one key per row.

The top-k and top-p filters search their threshold bit by bit, in 32 passes over the logits, and do not sort. The search
is exact, and k and p may change without a new compilation. `jax.lax.top_k` would need one for each k, because k is a
shape there. Tokens that tie with the last kept token are kept.

A token is the class at which the cumulative probability first exceeds a uniform random number. Vocabularies of at most
`SMALL_VOCABULARY` classes have one cumulative sum. Larger ones are drawn in two levels: first a block of 128 classes by
the sums of all blocks, then a class of this block. No cumulative sum over the vocabulary is then in memory. The rule
depends on the vocabulary alone, so that a key always gives the same token. The two methods round their sums
differently. For 16,384 similar classes they select different neighbours for one of 1,000 random numbers.

    B rows    C captions    T text    V vocabulary    P parts of the positions
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Shaped, UInt32

from dalle_jax.configuration.options import check
from dalle_jax.configuration.values import natural
from dalle_jax.errors import ConfigError
from dalle_jax.priors.guidance import Guidance, check_schedule
from dalle_jax.token_layout import LONGEST_STREAM, TokenLayout

Knobs = dict[str, Array | Guidance]
SMALL_VOCABULARY = 4096  # classes of the largest vocabulary that is drawn by one cumulative sum
_BLOCK = 128  # classes of a block of a larger one
_MOST_LOGITS = 2**25  # of a larger vocabulary in memory at once: 128 MiB in float32
_TEMPERATURES = ("temperature", "final_temperature", "choice_temperature")
_MOST = {"guidance": 1000, "steps": LONGEST_STREAM, **dict.fromkeys(_TEMPERATURES, 1e6)}  # beyond, float32 overflows


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Sampling parameters.

    Attributes:
      temperature: divides the logits; 0 selects the most likely token.
      final_temperature: temperature of the last step. Between the first and the last step the temperature is linear.
        None keeps it constant.
      top_k: keep the k most likely tokens; None for all.
      top_p: keep the smallest set of most likely tokens whose probability reaches p; None for all.
      guidance: s in (1 + s)·conditional - s·null logits; 0 for no guidance, which skips the null branch.
      guidance_schedule: how guidance grows over the steps, a name of `guidance.NAMES`; None for the prior's default.
      steps: number of decoding steps, in which several tokens are drawn together; None for the prior's default.
      order: order in which tokens are decided; None for the prior's default.
      choice_temperature: randomness in MaskGIT's selection of the tokens to keep; None for the prior's default.
    """

    temperature: float = 1.0
    final_temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 0.0
    guidance_schedule: str | None = None
    steps: int | None = None
    order: str | None = None
    choice_temperature: float | None = None

    def __post_init__(self):
        check(
            self, None, positive=["top_k", "top_p", "steps"], share=["top_p"],
            at_least_0=["temperature", "final_temperature", "choice_temperature", "guidance"], most=_MOST,
        )  # fmt: skip
        check_schedule(self.guidance_schedule)
        if self.guidance_schedule is not None and not self.guidance:
            raise ConfigError(
                f"guidance_schedule is {self.guidance_schedule!r}, which has no effect because guidance is 0: set "
                "guidance above 0 (--config.sampling.guidance), or leave guidance_schedule out."
            )


def check_options(options: SamplingOptions, layout: TokenLayout, absent: Mapping[str, str] | None = None) -> None:
    """Checks sampling parameters against a prior.

    Args:
      options: the sampling parameters.
      layout: layout of the prior's token stream.
      absent: `TokenPrior.absent_options`; None for a prior that has all of them.

    Raises:
      ConfigError: an option that the prior does not have, more steps than tokens, or guidance without a condition to
        lead towards.
    """
    for name, reason in (absent or {}).items():
        if (value := getattr(options, name)) is not None:
            raise ConfigError(f"{name}={value} {reason}")
    if options.steps is not None:
        natural("steps", options.steps, 1, layout.image_length)
    if options.guidance and not layout.condition.empty().size:
        raise ConfigError(
            f"guidance={options.guidance} leads from the empty condition towards the given one, but this prior draws "
            "without a condition (data.condition=none). Leave guidance out."
        )


def knobs(
    layout: TokenLayout,
    text: Shaped[ArrayLike, "C ..."],
    keys: Key[Array, " B"],
    options: SamplingOptions,
    negative: Shaped[ArrayLike, "_ ..."] | None = None,
    guidance_schedule: str = "constant",
) -> Knobs:
    """Returns the arguments of a compiled decoder. Which keys are present is static; their values are traced.

    Args:
      layout: layout of the token stream.
      text: conditions, such as padded captions, int32 [C, T].
      keys: one key per row, [B].
      options: sampling parameters.
      negative: conditions that guidance leads away from, [C, ...] or [1, ...]; None for the empty one.
      guidance_schedule: the prior's default.

    Returns:
      "temperature", and those of "final_temperature", "top_k", "top_p", "guidance" and "negative" that are set.

    Raises:
      ValueError: B is not a multiple of C, or a negative caption without guidance.
    """
    captions, rows = text.shape[0], keys.shape[0]
    if rows % captions:
        raise ValueError(f"{rows} keys for {captions} captions: expected the same number of keys for each.")
    if negative is not None and not options.guidance:
        raise ValueError("A negative caption has no effect without guidance; set guidance above 0.")
    found = {"temperature": jnp.float32(options.temperature)}
    for name in ("final_temperature", "top_k", "top_p"):
        if getattr(options, name) is not None:
            found[name] = jnp.float32(getattr(options, name))
    if options.guidance:
        null = jnp.asarray(layout.condition.empty())
        null = null[None] if negative is None else jnp.asarray(negative, null.dtype)
        guidance = Guidance(jnp.float32(options.guidance), options.guidance_schedule or guidance_schedule)
        found |= {"guidance": guidance, "negative": jnp.broadcast_to(null, text.shape)}
    return found


def _ordered_bits(x: Float[ArrayLike, "*axes"]) -> UInt32[Array, "*axes"]:
    """Maps float32 numbers to uint32 numbers in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = bits >> 31
    return jnp.where(sign == 1, ~bits, bits | jnp.uint32(1 << 31))


def _keep_at_least(
    x: Float[ArrayLike, "*axes V"], weights: Float[ArrayLike, "*axes V"], enough: Float[ArrayLike, ""]
) -> Bool[Array, "*axes V"]:
    """Selects the largest `x` of each row, as few as needed for the sum of their weights to reach `enough`."""
    bits = _ordered_bits(x)

    def refine(i, threshold):
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.where(bits >= higher, weights, 0).sum(-1, keepdims=True) >= enough
        return jnp.where(reached, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, refine, jnp.zeros((*x.shape[:-1], 1), jnp.uint32))
    return bits >= threshold


def filter_logits(
    logits: Float[ArrayLike, "*axes V"],
    *,
    top_k: Float[ArrayLike, ""] | Int[ArrayLike, ""] | None = None,
    top_p: Float[ArrayLike, ""] | None = None,
) -> Float[ArrayLike, "*axes V"]:
    """Sets the logits of filtered tokens to -inf.

    Args:
      logits: float32 [..., V].
      top_k: keep the k largest logits of each row; all if k ≥ V.
      top_p: of those, keep the smallest set of the largest whose probability reaches p.

    Returns:
      float32 [..., V].
    """
    if top_k is not None:
        k = jnp.clip(jnp.asarray(top_k, jnp.float32), 1, logits.shape[-1])
        logits = jnp.where(_keep_at_least(logits, jnp.ones_like(logits), k), logits, -jnp.inf)
    if top_p is not None:
        # The float32 sum of all probabilities may be slightly below 1, and p = 1 must keep every token.
        p = jnp.minimum(jnp.asarray(top_p, jnp.float32), 1 - 1e-6)
        logits = jnp.where(_keep_at_least(logits, jax.nn.softmax(logits), p), logits, -jnp.inf)
    return logits


def uniforms(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Float[Array, " B *axes"]:
    """Draws the random number of each token, float32 [B, *shape] in [0, 1), from one key per row."""
    return jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)


def choose(
    logits: Float[ArrayLike, "B *axes V"], keys: Key[Array, " B"], knobs: Knobs, progress: Float[ArrayLike, ""]
) -> Int[Array, " B *axes"]:
    """Draws one token per row and position with the sampling parameters in `knobs`.

    Args:
      logits: float32 [B, ..., V].
      keys: one key per row for this step, [B].
      knobs: the result of `knobs`.
      progress: 0 at the first step, 1 at the last step.

    Returns:
      Tokens, int32 [B, ...].
    """
    return choose_at(logits, uniforms(keys, logits.shape[1:-1]), knobs, progress)


def choose_at(
    logits: Float[ArrayLike, "B *axes V"],
    uniform: Float[ArrayLike, " B *axes"],
    knobs: Knobs,
    progress: Float[ArrayLike, ""],
) -> Int[Array, " B *axes"]:
    """Selects one token per row and position as `choose` does, given the random numbers of `uniforms`."""
    temperature = knobs["temperature"]
    if "final_temperature" in knobs:
        temperature = temperature + (knobs["final_temperature"] - temperature) * progress
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)
    logits = filter_logits(logits, top_k=knobs.get("top_k"), top_p=knobs.get("top_p"))
    return _draw_at(logits, uniform, jnp.where(temperature > 0, 1.0, 0.0))


def draw(
    logits: Float[ArrayLike, "B *axes V"], keys: Key[Array, " B"], temperature: Float[ArrayLike, ""]
) -> Int[Array, " B *axes"]:
    """Draws one token per row and position from softmax(logits), or selects the largest logit.

    This needs one random number per token. Gumbel noise needs one per class, which takes a third of a MaskGIT prior's
    time on a CPU. See the top of this file for the two methods.

    Args:
      logits: float32 [B, ..., V].
      keys: one key per row, [B].
      temperature: float32 scalar; 0 selects the largest logit, any other value draws.

    Returns:
      Tokens, int32 [B, ...].
    """
    return _draw_at(logits, uniforms(keys, logits.shape[1:-1]), temperature)


def _draw_at(
    logits: Float[ArrayLike, "B *axes V"], uniform: Float[ArrayLike, " B *axes"], temperature: Float[ArrayLike, ""]
) -> Int[Array, " B *axes"]:
    """Selects the token of each random number, float32 [B, ...] in [0, 1); see `draw`."""
    vocab, top = logits.shape[-1], logits.max(-1, keepdims=True)
    if vocab <= SMALL_VOCABULARY:
        drawn = _select(jnp.exp(logits - top), uniform)
    else:
        drawn = _select_by_blocks(logits, top, uniform)
    return jnp.where((temperature > 0) & (drawn < vocab), drawn, _first(~(logits < top)))


def _first(where: Bool[ArrayLike, "*axes V"]) -> Int[Array, "*axes"]:
    """Returns the first true place of each row, or V: bool [..., V] to int32 [...]."""
    places = jax.lax.broadcasted_iota(jnp.int32, where.shape, where.ndim - 1)
    return jnp.where(where, places, where.shape[-1]).min(-1)


def _select(weights: Float[ArrayLike, "*axes V"], uniform: Float[ArrayLike, "*axes"]) -> Int[Array, "*axes"]:
    """Selects a class by its share of the weights, with one cumulative sum; V if rounding leaves no class."""
    reached = jnp.cumsum(weights, axis=-1)
    # Rounding errors of the sums must neither select a class without weight nor leave no class at all.
    return _first((reached > uniform[..., None] * reached[..., -1:]) & (weights > 0))


def _select_by_blocks(
    logits: Float[ArrayLike, "*axes V"], top: Float[ArrayLike, "*axes 1"], uniform: Float[ArrayLike, "*axes"]
) -> Int[Array, "*axes"]:
    """Selects a class by its share of exp(logits - top), first its block and then the class; V if rounding leaves none.

    Rounding errors select neither a block nor a class without weight.
    """
    missing = -logits.shape[-1] % _BLOCK
    padded = jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)
    blocks = padded.reshape(*logits.shape[:-1], -1, _BLOCK)
    sums = jnp.exp(blocks - top[..., None]).sum(-1)
    reached = jnp.cumsum(sums, axis=-1)
    aim = uniform * reached[..., -1]
    block = _first((reached > aim[..., None]) & (sums > 0))
    at = lambda x, place: jnp.take_along_axis(x, place[..., None], axis=-1, mode="clip")[..., 0]
    before = jnp.where(block > 0, at(reached, block - 1), 0.0)
    chosen = jnp.take_along_axis(blocks, block[..., None, None], axis=-2, mode="clip")[..., 0, :]
    weights = jnp.exp(chosen - top)
    inside = _first((jnp.cumsum(weights, axis=-1) > (aim - before)[..., None]) & (weights > 0))
    last = _BLOCK - 1 - _first(weights[..., ::-1] > 0)
    found = block * _BLOCK + jnp.minimum(inside, last)
    return jnp.where(block < sums.shape[-1], found, logits.shape[-1])


def in_parts(
    function: Callable[..., tuple[Array, ...]], vocabulary: int, *arrays: Shaped[ArrayLike, "_ N *_"]
) -> tuple[Array, ...]:
    """Applies a function that computes logits to all positions, so that few logits are in memory at once.

    A small vocabulary's logits are computed at once. The positions of a larger one are split into equal parts.

    Args:
      function: maps arrays [_, N / P, ...] to arrays [B, N / P], each position alone.
      vocabulary: V.
      *arrays: [_, N, ...]; the first one has a row for each row of logits.

    Returns:
      Arrays [B, N].
    """
    rows, length = arrays[0].shape[:2]
    parts = 1
    if vocabulary > SMALL_VOCABULARY:
        fits = lambda count: length % count == 0 and rows * (length // count) * vocabulary <= _MOST_LOGITS
        parts = next(filter(fits, range(1, length)), length)
    if parts == 1:
        return function(*arrays)
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], parts, -1, *x.shape[2:]), 1, 0)
    found = jax.lax.map(lambda part: function(*part), tuple(map(split, arrays)))
    return tuple(jnp.moveaxis(y, 0, 1).reshape(y.shape[1], length) for y in found)
