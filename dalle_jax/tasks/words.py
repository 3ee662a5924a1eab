"""Metrics in words, and the commands that use a trained model, for the summary at the end of a training."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from dalle_jax.configuration.options import defaults_of
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.reporting.units import with_unit

# Lower bounds of the peak signal-to-noise ratio in dB, and how such reconstructions look.
_PSNR = (
    (34, "hardly different from the real images"),
    (28, "close to the real images; only fine texture is lost"),
    (24, "good; small details are lost"),
    (20, "coarse: shapes and colours are right, edges and details are blurred"),
    (-math.inf, "poor: only large areas of colour can be recognised"),
)
_TOKENS_PER_CODE = 4  # fewer tokens cannot show whether a code is unused
_MAIN = "python -m dalle_jax.main"
# Keys of `data` that decide which images and captions a training sees, next to source, path and image_size.
_DATA_CHOICES = (
    "fit", "data_dir", "image_key", "caption_key", "caption_lines", "caption_from", "train_split", "eval_split",
)  # fmt: skip


def reconstruction_in_words(psnr: float) -> str:
    """Says how reconstructions with a peak signal-to-noise ratio, in dB, look."""
    look = next(words for bound, words in _PSNR if psnr >= bound or bound == -math.inf)
    return f"Reconstructions have {with_unit('psnr', psnr)}: {look}. No prior can draw finer images with these tokens."


def codebook_in_words(usage: float, perplexity: float, vocab_size: int, tokens: int) -> str:
    """Says how much of the codebook is used.

    Args:
      usage: share of the codes that occur.
      perplexity: exp of the entropy of their frequencies.
      vocab_size: number of codes.
      tokens: number of tokens in which they were counted.
    """
    used = round(usage * vocab_size)
    said = f"{used:,} of {vocab_size:,} codes are used, as evenly as {perplexity:,.0f} equally frequent codes"
    if tokens < _TOKENS_PER_CODE * vocab_size:
        return f"{said}. {tokens:,} tokens were evaluated, which is too few to find unused codes."
    if usage < 0.1:
        return f"{said}: most codes are unused. Train longer, or set a smaller --config.model.vocab_size."
    if usage < 0.5:
        return f"{said}: fewer than half. A smaller --config.model.vocab_size would be enough for these images."
    if perplexity < 0.1 * used:
        return f"{said}: a few codes dominate, such as those of flat areas."
    return f"{said}: the codebook is in good use."


def tokens_in_words(metrics: Mapping[str, float], vocab_size: int, masked: bool) -> list[str]:
    """Says how well a prior predicts image tokens.

    Args:
      metrics: of the prior; "image_nats", and "image_accuracy" if known.
      vocab_size: number of codes.
      masked: whether the mean is over masked tokens (MaskGIT) and not over all tokens.
    """
    nats = metrics["image_nats"]
    choices = math.exp(min(nats, 50.0))
    kind = "masked token" if masked else "image token"
    said = (
        f"Each {kind} costs {with_unit('image_nats', nats).partition(' ')[0]} nats: the prior hesitates between "
        f"{choices:,.3g} of {vocab_size:,} codes (guessing: {math.log(vocab_size):.3g} nats)."
    )
    accuracy = metrics.get("image_accuracy")
    right = [] if accuracy is None else [f"Its first choice is right for {with_unit('image_accuracy', accuracy)}."]
    return [said, *right]


def retrieval_in_words(metrics: Mapping[str, float]) -> list[str]:
    """Says how often CLIP finds the right partner among `metrics["among"]` examples."""
    among = round(metrics["among"])
    if among < 2:
        return ["One example is too few to measure CLIP: give more held-out images."]
    found = with_unit("retrieval@1", metrics["retrieval@1"])
    return [f"CLIP finds the right partner among {among} in {found} of all cases (guessing: {1 / among:.3g})."]


def example_captions(captions: Iterable[str], count: int) -> list[str]:
    """Returns the first captions that can be typed as a prompt, at most `count` of them."""
    return [caption for caption in captions if caption and "|" not in caption and "⁇" not in caption][:count]


def data_flags(config: ConfigDict) -> list[str]:
    """Returns the flags that give another training the same data, if it is not the variant's embedded set."""
    data = config.data
    if not data.get("path"):
        return []
    usual = defaults_of(DataOptions)
    changed = [name for name in _DATA_CHOICES if data.get(name, usual[name]) not in (None, usual[name])]
    return [flag(f"config.data.{name}", data[name]) for name in ("source", "path", "image_size", *changed)]


def flag(name: str, value: Any) -> str:
    """Returns "--name=value", quoted for a shell."""
    return f"--{name}={shlex.quote(str(value))}"


def train_command(file: str, config: ConfigDict, *flags: str) -> str:
    """Returns the command that trains another task on the data of `config`."""
    return " ".join([_MAIN, f"--config=configs/{file}.py:{config.variant}", *data_flags(config), *flags])


def draw_command(workdir: str, captions: Sequence[str], *flags: str) -> str:
    """Returns the command that draws captions with the prior in `workdir`."""
    prompts = flag("config.prompts", "|".join(captions) if captions else "CAPTION")
    return " ".join([_MAIN, "--config=configs/generate.py", flag("config.model_workdir", workdir), *flags, prompts])
