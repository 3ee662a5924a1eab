"""The best of N: candidates for a caption, ranked by CLIP (DALL-E, section 2.6 and figure 6).

C captions    k pictures kept of each
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence

import numpy as np

from dalle_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Candidates of each caption with their scores; after `best`, the best one first.

    Attributes:
      images: uint8 [C, k, H, W, 3].
      scores: float32 [C, k], cosines of picture and caption; None where they were not ranked.
      numbers: int [C, k], which candidate each one is: `generate` with the same seed draws it as its picture of that
        number.
    """

    images: np.ndarray
    scores: np.ndarray | None
    numbers: np.ndarray

    def best(self, keep: int) -> Ranked:
        """The `keep` highest scores of each caption, in falling order; of equal ones the earlier candidate first."""
        return self._at(np.argsort(-self.scores, axis=1, kind="stable")[:, :keep])

    def best_of_first(self, count: int) -> Ranked:
        """The best one of each caption's first `count` candidates, k = 1: what a smaller N would have kept.

        All of those candidates have to be there still, in falling order (`best_of` with keep = candidates).
        """
        return self._at((self.numbers < count).argmax(1)[:, None])

    def _at(self, places: np.ndarray) -> Ranked:
        """Those at `places`, int [C, k'], of each caption."""
        taken = lambda x: np.take_along_axis(x, places.reshape(places.shape + (1,) * (x.ndim - 2)), axis=1)
        return Ranked(taken(self.images), taken(self.scores), taken(self.numbers))


class Reranking:
    """The reranking half of `TextToImage`."""

    def best_of(
        self, captions: str | Sequence[str], candidates: int, keep: int = 1, seed: int = 0, **options
    ) -> Ranked:
        """Draws candidates for each caption and keeps those that CLIP finds fittest.

        Drawn and scored `rows_at_once` at a time; only the best are held.

        Args:
          captions: a caption, or a sequence of C.
          candidates: N, drawn for each.
          keep: k of them to return.
          seed, **options: as in `generate`, whose first N pictures the candidates are.

        Returns:
          See `Ranked`; C is 1 for a single caption.

        Raises:
          ConfigError: no CLIP was loaded, or k is not in [1, N].
          DataError: an empty caption.
        """
        if self.scorer is None:
            raise ConfigError(
                f"Candidates are ranked by a CLIP, and {self.workdir or 'this model'} was loaded without one: give "
                "TextToImage.load(…, clip=DIR) or --config.clip=DIR, the workdir of configs/clip.py or a folder that "
                "dalle_jax.pretrained.clip wrote."
            )
        if not 1 <= keep <= candidates:
            raise ConfigError(f"keep is {keep} of candidates={candidates}; expected 1 to {candidates}.")
        captions = [captions] if isinstance(captions, str) else list(captions)
        kept = []
        for _, parts in itertools.groupby(self.chunks(captions, candidates, seed, **options), operator.itemgetter(0)):
            best = None
            for start, first, images in parts:
                here, shape = captions[start : start + len(images)], images.shape[:2]
                scores = self.scorer.score(images.reshape(-1, *images.shape[2:]), list(np.repeat(here, shape[1])))
                found = [images, scores.reshape(shape), np.broadcast_to(first + np.arange(shape[1]), shape)]
                if best is not None:
                    found = [np.concatenate(pair, axis=1) for pair in zip(_fields(best), found)]
                best = Ranked(*found).best(keep)
            kept.append(best)
        return Ranked(*(np.concatenate(column) for column in zip(*map(_fields, kept))))


def _fields(ranked: Ranked) -> list[np.ndarray]:
    return [ranked.images, ranked.scores, ranked.numbers]
