"""The best of N candidates per caption, ranked by CLIP (DALL-E, section 2.6 and figure 6).

C captions    k images kept per caption
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from dalle_jax.configuration.values import natural
from dalle_jax.errors import ConfigError
from dalle_jax.text_to_image import inputs
from dalle_jax.text_to_image.drawing import MOST_IMAGES
from dalle_jax.text_to_image.output import with_bar


@dataclasses.dataclass(frozen=True)
class Ranked:
    """Candidates of each caption with their scores. `best` sorts them, highest score first.

    Attributes:
      images: uint8 [C, k, H, W, 3].
      scores: float32 [C, k], cosines of image and caption, or None if the images were not ranked.
      numbers: int [C, k], the candidate's number. Candidate i is image i of `generate` with the same seed.
    """

    images: np.ndarray
    scores: np.ndarray | None
    numbers: np.ndarray

    def __repr__(self) -> str:
        captions, kept, height, width = self.images.shape[:4]
        best = "not ranked" if self.scores is None else f"best score {self.scores.max():.3f}"
        return f"Ranked({captions} x {kept} images of {height} x {width} pixels, {best})"

    def best(self, keep: int) -> Ranked:
        """Returns the `keep` highest scores of each caption, in falling order, equal scores by candidate number."""
        return self._at(np.argsort(-self.scores, axis=1, kind="stable")[:, :keep])

    def best_of_first(self, count: int) -> Ranked:
        """Returns the best of the first `count` candidates of each caption, k = 1: the result of a smaller N.

        All candidates must still be present, in falling order (`best_of` with keep = candidates).
        """
        return self._at((self.numbers < count).argmax(1)[:, None])

    def _at(self, places: np.ndarray) -> Ranked:
        """Selects the candidates at `places`, int [C, k'], of each caption."""
        taken = lambda x: np.take_along_axis(x, places.reshape(places.shape + (1,) * (x.ndim - 2)), axis=1)
        return Ranked(taken(self.images), taken(self.scores), taken(self.numbers))


class Scorer(Protocol):
    """Scores images against captions; `ClipScorer` is one."""

    def score(self, images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
        """Scores images, uint8 [B, H, W, 3], against B captions: float32 [B], higher is better."""


class Model(Protocol):
    """A text-to-image model as the ranking needs it; `TextToImage` is one.

    Attributes:
      scorer: ranks the candidates; None if the model has none.
      workdir: the workdir that it was loaded from, for messages.
      rows_at_once: largest number of images drawn at once.
    """

    @property
    def scorer(self) -> Scorer | None: ...

    @property
    def rows_at_once(self) -> int: ...

    @property
    def workdir(self) -> str: ...

    def chunks(
        self, captions: Sequence[str], n: int, seed: int = 0, **sampling: Any
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Draws images chunk by chunk; see `TextToImage.chunks`."""


def best_of(
    model: Model,
    captions: str | Sequence[str],
    candidates: int,
    keep: int,
    seed: int,
    progress: bool | None = False,
    **sampling: Any,
) -> Ranked:
    """Draws candidates for each caption and keeps the best; see `TextToImage.best_of`.

    Images are drawn and scored chunk by chunk. Only the best so far are held in memory.
    """
    if model.scorer is None:
        raise ConfigError(
            f"CLIP ranks the candidates, but {model.workdir or 'this model'} was loaded without a CLIP. Give "
            "TextToImage.load(…, clip=DIR) or --config.clip=DIR: the workdir of configs/clip.py, or a folder that "
            "dalle_jax.pretrained.clip wrote."
        )
    candidates = natural("candidates", candidates, 1, MOST_IMAGES)
    keep = natural("keep", keep, least=1, most=candidates)
    captions = inputs.captions(captions)
    kept, drawn = [], model.chunks(captions, candidates, seed, **sampling)
    drawn = with_bar(drawn, len(captions) * candidates, model.rows_at_once, progress)
    for _, parts in itertools.groupby(drawn, operator.itemgetter(0)):
        best = None
        for start, first, images in parts:
            here, shape = captions[start : start + len(images)], images.shape[:2]
            scores = model.scorer.score(images.reshape(-1, *images.shape[2:]), list(np.repeat(here, shape[1])))
            found = [images, scores.reshape(shape), np.broadcast_to(first + np.arange(shape[1]), shape)]
            if best is not None:
                found = [np.concatenate(pair, axis=1) for pair in zip(_fields(best), found)]
            best = Ranked(*found).best(keep)
        kept.append(best)
    return Ranked(*(np.concatenate(column) for column in zip(*map(_fields, kept))))


def _fields(ranked: Ranked) -> list[np.ndarray]:
    return [ranked.images, ranked.scores, ranked.numbers]
