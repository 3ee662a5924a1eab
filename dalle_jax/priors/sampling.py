"""From logits to tokens: the sampling options, temperature, top-k, top-p, guidance, and one key for each row.

Both filters search for their threshold bit by bit instead of sorting: 32 passes over the logits, exact, with k and
p free to change without compiling anew. Tokens tied with the last one kept are kept.

    B rows    C captions    T text    V vocabulary
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dalle_jax.configuration.options import check
from dalle_jax.token_layout import TokenLayout

Knobs = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      final_temperature: the temperature at the last step, to which it moves linearly; None: the same throughout.
      top_k: keep the k most likely tokens; None for all.
      top_p: keep the likeliest tokens that together hold this mass; None for all.
      guidance: s in (1 + s)·conditional - s·null logits; 0 does without the null branch.
      steps: decoding steps, where the prior has a choice; None for its own.
      order: in which tokens are decided, where the prior has a choice; None for its own.
      choice_temperature: randomness of MaskGIT's choice of what to keep; None for its own.
    """

    temperature: float = 1.0
    final_temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 0.0
    steps: int | None = None
    order: str | None = None
    choice_temperature: float | None = None

    def __post_init__(self):
        check(
            self, None, positive=["top_k", "top_p", "steps"], share=["top_p"],
            at_least_0=["temperature", "final_temperature", "choice_temperature", "guidance"],
        )  # fmt: skip


def knobs(layout: TokenLayout, text: jax.Array, keys: jax.Array, options: SamplingOptions, negative=None) -> Knobs:
    """What a compiled decoder takes: which of them are there is static, their values are not.

    Args:
      layout: of the stream.
      text: int32 [C, T].
      keys: [B] keys.
      options: checked numbers.
      negative: int32 [C, T] or [1, T], what guidance leads away from; None: the empty caption.

    Raises:
      ValueError: where B is not a multiple of C, or there is a negative caption and no guidance.
    """
    captions, rows = text.shape[0], keys.shape[0]
    if rows % captions:
        raise ValueError(f"{rows} keys for {captions} captions: expected the same number of candidates for each.")
    if negative is not None and not options.guidance:
        raise ValueError("A negative caption does nothing without guidance: give guidance > 0.")
    found = {"temperature": jnp.float32(options.temperature)}
    for name in ("final_temperature", "top_k", "top_p"):
        if getattr(options, name) is not None:
            found[name] = jnp.float32(getattr(options, name))
    if options.guidance:
        null = jnp.asarray(layout.null_text())[None] if negative is None else jnp.asarray(negative, jnp.int32)
        found |= {"guidance": jnp.float32(options.guidance), "negative": jnp.broadcast_to(null, text.shape)}
    return found


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 in the same order as the float32 `x`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    sign = bits >> 31
    return jnp.where(sign == 1, ~bits, bits | jnp.uint32(1 << 31))


def _keep_at_least(x: jax.Array, weights: jax.Array, enough: jax.Array) -> jax.Array:
    """The largest `x` whose weights together reach `enough`, as a bool mask [..., V]."""
    bits = _ordered_bits(x)

    def refine(i, threshold):
        higher = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.where(bits >= higher, weights, 0).sum(-1, keepdims=True) >= enough
        return jnp.where(reached, higher, threshold)

    threshold = jax.lax.fori_loop(0, 32, refine, jnp.zeros((*x.shape[:-1], 1), jnp.uint32))
    return bits >= threshold


def filter_logits(logits: jax.Array, *, top_k: jax.Array | None = None, top_p: jax.Array | None = None) -> jax.Array:
    """Sets what is filtered out to -inf.

    Args:
      logits: float32 [..., V].
      top_k: keep the k largest of each row (all, where k ≥ V).
      top_p: then keep the smallest set of the largest whose probability reaches p.

    Returns:
      float32 [..., V].
    """
    if top_k is not None:
        k = jnp.clip(jnp.asarray(top_k, jnp.float32), 1, logits.shape[-1])
        logits = jnp.where(_keep_at_least(logits, jnp.ones_like(logits), k), logits, -jnp.inf)
    if top_p is not None:
        # A whole float32 sum of probabilities may fall a few ulps short of 1: p = 1 must not drop anything real.
        p = jnp.minimum(jnp.asarray(top_p, jnp.float32), 1 - 1e-6)
        logits = jnp.where(_keep_at_least(logits, jax.nn.softmax(logits), p), logits, -jnp.inf)
    return logits


def guide(conditional: jax.Array, null: jax.Array, scale: jax.Array) -> jax.Array:
    """Classifier-free guidance of logits: (1 + s)·conditional - s·null (Muse, section 2.7)."""
    return (1 + scale) * conditional - scale * null


def choose(logits: jax.Array, keys: jax.Array, knobs: Knobs, progress: jax.Array | float) -> jax.Array:
    """Draws tokens under `knobs`.

    Args:
      logits: float32 [B, ..., V].
      keys: [B] keys, of this step.
      knobs: from `knobs`.
      progress: 0 at the first step, 1 at the last.

    Returns:
      int32 [B, ...].
    """
    temperature = knobs["temperature"]
    if "final_temperature" in knobs:
        temperature = temperature + (knobs["final_temperature"] - temperature) * progress
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)
    logits = filter_logits(logits, top_k=knobs.get("top_k"), top_p=knobs.get("top_p"))
    return draw(logits, keys, jnp.where(temperature > 0, 1.0, 0.0))


def draw(logits: jax.Array, keys: jax.Array, temperature: jax.Array) -> jax.Array:
    """One token a row, each from its own key; temperature 0 takes the largest logit.

    Where the cumulative probability first exceeds a uniform number: one random number a token. Gumbel noise would take
    one for each class, a third of a MaskGIT prior's time on a CPU.

    Args:
      logits: float32 [B, ..., V].
      keys: [B] keys.
      temperature: float32 [].

    Returns:
      int32 [B, ...].
    """
    vocab, top = logits.shape[-1], logits.max(-1, keepdims=True)
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    first = lambda where: jnp.where(where, classes, vocab).min(-1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, logits.shape[1:-1]))(keys)[..., None]
    weights = jnp.exp(logits - top)
    reached = jnp.cumsum(weights, axis=-1)
    # Sums that differ by rounding alone must not let in what has no weight, nor leave nothing.
    drawn = first((reached > uniform * reached[..., -1:]) & (weights > 0))
    return jnp.where((temperature > 0) & (drawn < vocab), drawn, first(~(logits < top)))
