"""Measures the captions of a data set: how many an image has, their languages, words and tokens."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import statistics
import unicodedata
from collections.abc import Sequence

from dalle_jax.data.text import CaptionModel, TextModel, normalize

_MOST_ENCODED = 5000  # captions to train and apply a text model on
_SMALLEST_VOCABULARY = 1024
_LETTERS_READ = 30  # of a caption, to find its script
_FIRST_SHOWN = 5
# The translations of a text file: `de.utf8=Eine Katze`, `pt_BR.UTF-8=…`, `zh-CN: …` is not one.
_TRANSLATION = re.compile(r"\s*[a-z]{2,3}([_@-][A-Za-z]+)*(\.[A-Za-z0-9-]+)?=")


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median and the largest of some whole numbers."""

    median: int
    most: int


@dataclasses.dataclass(frozen=True)
class TokenStatistics:
    """The tokens of captions, without BPE dropout.

    Attributes:
      vocab_size: V of the text model that counted them.
      trained: whether that model is a temporary one, trained on the same captions.
      per_caption: tokens of a caption.
      text_length: `text.length`, or None if it is not known.
      share_cut: share of captions with more tokens than `text_length`; None without one.
      length_for_all: the `text.length` that cuts no caption.
      length_for_99_percent: the `text.length` that cuts at most one caption in a hundred.
    """

    vocab_size: int
    trained: bool
    per_caption: Spread
    text_length: int | None
    share_cut: float | None
    length_for_all: int
    length_for_99_percent: int


@dataclasses.dataclass(frozen=True)
class CaptionStatistics:
    """The captions of the images that a survey looked at.

    Attributes:
      per_image: captions of an image that has some.
      without: share of images without a caption.
      first: the first caption of the first images.
      translations: share of captions that begin with a language code (`de.utf8=`).
      other_scripts: share of captions in another script than the first caption of their image.
      words: words of a caption.
      different_words: number of different words, in lower case.
      tokens: see `TokenStatistics`; None if no caption holds text.
    """

    per_image: Spread
    without: float
    first: tuple[str, ...]
    translations: float
    other_scripts: float
    words: Spread
    different_words: int
    tokens: TokenStatistics | None


def measure_captions(
    captions: Sequence[Sequence[str]],
    text_length: int | None = None,
    text_model: CaptionModel | None = None,
    vocab_size: int | None = None,
) -> CaptionStatistics | None:
    """Measures captions.

    Args:
      captions: the captions of each image, possibly none, in the order of the images.
      text_length: T, the length at which captions are cut.
      text_model: counts the tokens. None trains a temporary model on up to 5,000 of the captions.
      vocab_size: V of that temporary model; None chooses one that holds all letters.

    Returns:
      The statistics, or None without any caption.

    Raises:
      ConfigError: `vocab_size` is too small for the captions.
    """
    captioned = [each for each in captions if each]
    if not captioned:
        return None
    flat = [caption for each in captioned for caption in each]
    scripts = [[_script(caption) for caption in each] for each in captioned]
    others = sum(script not in ("", each[0]) for each in scripts for script in each)
    words = [normalize(caption).split() for caption in flat]
    return CaptionStatistics(
        per_image=_spread([len(each) for each in captioned]),
        without=1 - len(captioned) / len(captions),
        first=tuple(each[0] for each in captioned[:_FIRST_SHOWN]),
        translations=sum(map(_is_translation, flat)) / len(flat),
        other_scripts=others / len(flat),
        words=_spread([len(each) for each in words]),
        different_words=len({word for each in words for word in each}),
        tokens=_tokens(flat, text_length, text_model, vocab_size),
    )


def _tokens(
    captions: Sequence[str], text_length: int | None, text_model: CaptionModel | None, vocab_size: int | None
) -> TokenStatistics | None:
    step = -(-len(captions) // _MOST_ENCODED)
    sample = [caption for caption in map(normalize, captions[::step]) if caption]
    if not sample:
        return None
    model = text_model
    if model is None:
        model = TextModel.train(sample, vocab_size or max(_SMALLEST_VOCABULARY, 4 * len(set().union(*sample))))
    lengths = sorted(len(model.encode(each, max_length=len(each) + each.count(" ") + 1)[0]) for each in sample)
    return TokenStatistics(
        vocab_size=model.vocab_size,
        trained=text_model is None,
        per_caption=_spread(lengths),
        text_length=text_length,
        share_cut=None if text_length is None else sum(each > text_length for each in lengths) / len(lengths),
        length_for_all=lengths[-1],
        length_for_99_percent=lengths[-1 - len(lengths) // 100],
    )


def _is_translation(caption: str) -> bool:
    """Whether a caption, or a line of it, begins with a language code."""
    return any(_TRANSLATION.match(line) for line in caption.splitlines())


def _script(caption: str) -> str:
    """Returns the script of most letters ("LATIN", "CYRILLIC", …), or "" without letters."""
    if caption.isascii():
        return "LATIN" if any(letter.isalpha() for letter in caption) else ""
    text = caption[match.end() :] if (match := _TRANSLATION.match(caption)) else caption
    letters = [letter for letter in text if letter.isalpha()][:_LETTERS_READ]
    return collections.Counter(map(_script_of_letter, letters)).most_common(1)[0][0] if letters else ""


@functools.lru_cache(maxsize=10_000)
def _script_of_letter(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0]


def _spread(numbers: Sequence[int]) -> Spread:
    return Spread(statistics.median_low(numbers), max(numbers))
