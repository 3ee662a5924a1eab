"""The CLIP score from sums."""

import numpy as np
import pytest

from dalle_jax.errors import DataError
from dalle_jax.metrics import clip_score


def test_the_score_is_the_mean_of_positive_cosines_in_percent():
    stats = clip_score.add(clip_score.empty(), np.array([0.5, -0.5, 0.25], np.float32))
    assert clip_score.compute(stats) == {"clip_score": pytest.approx(25.0)}


def test_parts_and_filled_up_batches():
    cosines = np.random.default_rng(0).uniform(-1, 1, 11).astype(np.float32)
    whole = clip_score.add(clip_score.empty(), cosines)
    first = clip_score.add(clip_score.empty(), cosines[:4])
    last = clip_score.add(clip_score.empty(), np.append(cosines[4:], 0.9), np.arange(8) < 7)
    assert clip_score.compute(clip_score.merge(first, last))["clip_score"] == pytest.approx(
        clip_score.compute(whole)["clip_score"], rel=1e-12
    )


def test_invalid_cosines_are_rejected():
    with pytest.raises(DataError, match="CLIP score"):
        clip_score.compute(clip_score.empty())
    with pytest.raises(ValueError, match="cosines"):
        clip_score.add(clip_score.empty(), np.array([31.4]))
    with pytest.raises(ValueError, match="cosines"):
        clip_score.add(clip_score.empty(), np.array([np.nan]))
