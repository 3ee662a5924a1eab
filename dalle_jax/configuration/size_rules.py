"""Rules for sizes that follow the data set: the number of updates, the text vocabulary and the text length.

A configuration whose `steps`, `text.vocab_size` or `text.length` is None has a section `from_data` with these rules.
`dalle_jax/jobs/sizes.py` measures the data set and applies them once, at the beginning of a run.
"""

from __future__ import annotations

import copy
import dataclasses

from ml_collections import ConfigDict

from dalle_jax.configuration.options import check, from_config
from dalle_jax.errors import ConfigError
from dalle_jax.token_layout import LARGEST_VOCABULARY, LONGEST_STREAM

_MULTIPLE = 4  # of the text length
_SHORTEST = 8
_SMALLEST_VOCABULARY = 64


@dataclasses.dataclass(frozen=True)
class SizeRules:
    """Bounds of the sizes that follow the data set.

    Attributes:
      passes: number of passes over the training split, as far as the bounds of the updates allow.
      min_steps: least number of updates.
      max_steps: largest number of updates.
      max_vocab_size: largest text vocabulary. A set with more different letters gets what its letters need.
      max_text_length: largest number of text positions.
    """

    passes: float = 40.0
    min_steps: int = 1000
    max_steps: int = 20_000
    max_vocab_size: int = 1024
    max_text_length: int = 64

    def __post_init__(self):
        check(
            self, "from_data", positive=["passes", "min_steps", "max_steps", "max_vocab_size", "max_text_length"],
            most={"max_vocab_size": LARGEST_VOCABULARY, "max_text_length": LONGEST_STREAM},
        )  # fmt: skip
        if self.max_steps < self.min_steps:
            raise ConfigError(
                f"config.from_data.max_steps is {self.max_steps}; expected at least min_steps={self.min_steps}."
            )

    def steps(self, examples: int, batch_size: int) -> int:
        """Returns the number of updates for a training split of `examples` examples."""
        return min(max(round(self.passes * examples / batch_size), self.min_steps), self.max_steps)

    def vocab_size(self, captions: int, words: int, letters: int) -> int:
        """Returns the size of the text vocabulary.

        Each word may have its own id, but a word of a single caption teaches nothing, so captions bound it too.

        Args:
          captions: number of captions.
          words: number of different words.
          letters: number of different letters that need an id.
        """
        size = _rounded_up(letters + min(words, captions), _SMALLEST_VOCABULARY)
        return max(min(size, self.max_vocab_size), _rounded_up(2 * letters, _SMALLEST_VOCABULARY))

    def text_length(self, tokens: int) -> int:
        """Returns the number of text positions for captions of `tokens` tokens."""
        return min(max(_rounded_up(tokens, _MULTIPLE), _SHORTEST), self.max_text_length)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def rules_of(config: ConfigDict) -> SizeRules:
    """Returns the rules of a training configuration; the defaults if it has no section `from_data`.

    Raises:
      ConfigError: an unknown key or an invalid value.
    """
    return from_config(SizeRules, config.get("from_data", {}), "from_data")


def open_sizes(config: ConfigDict) -> list[str]:
    """Returns the keys of a training configuration that follow the data set and are not fixed yet."""
    sizes = {"steps": config.steps}
    if "text" in config:
        sizes |= {"text.vocab_size": config.text.vocab_size, "text.length": config.text.length}
    return [key for key, size in sizes.items() if size is None]


def with_largest(config: ConfigDict) -> ConfigDict:
    """Returns a copy in which every size that is not fixed yet has the largest value that its rules allow.

    This is enough to check a configuration, or to compile it, without its data.
    """
    config = copy.deepcopy(config)  # keeps references
    for part in (config, *([config.tokenizer] if "tokenizer" in config else [])):
        rules = rules_of(part)
        largest = {
            "steps": rules.max_steps,
            "text.vocab_size": rules.max_vocab_size,
            "text.length": rules.max_text_length,
        }
        part.update_from_flattened_dict({key: largest[key] for key in open_sizes(part)})
    return config
