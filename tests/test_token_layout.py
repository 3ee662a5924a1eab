"""The token stream's ids and positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_jax.token_layout import PaddedIds, TokenLayout

CAPTIONS = PaddedIds(vocab=10, length=5)
LAYOUT = TokenLayout(CAPTIONS, image_vocab=7, height=3, width=4)


def test_sizes():
    assert (LAYOUT.prefix_length, LAYOUT.image_length, LAYOUT.length, LAYOUT.mask_id) == (5, 12, 17, 7)
    started = LAYOUT.with_start_tokens()
    assert (started.prefix_length, started.length, started.condition.length, CAPTIONS.ids) == (7, 19, 5, 15)


@given(st.lists(st.integers(0, 9), max_size=5))
def test_padding_has_an_id_for_each_position(ids):
    padded = CAPTIONS.pad(ids)
    assert padded.dtype == np.int32 and padded.shape == (5,)
    assert padded.tolist() == ids + [10 + position for position in range(len(ids), 5)]
    assert CAPTIONS.given(padded) == ids


def test_the_empty_caption_is_padding_everywhere():
    assert CAPTIONS.empty().tolist() == [10, 11, 12, 13, 14] == CAPTIONS.pad([]).tolist()
    CAPTIONS.empty()[:] = 0
    assert CAPTIONS.empty()[0] == 10, "a caller's change must not affect later calls"


def test_all_padding_is_one_class():
    rows = jnp.array([[0, 9, 12, 13, 14]])
    assert CAPTIONS.targets(rows, with_padding=False).tolist() == [[0, 9, 10, 10, 10]]
    assert CAPTIONS.targets(rows, with_padding=True).tolist() == rows.tolist()
    assert [CAPTIONS.classes(with_padding=each) for each in (False, True)] == [11, 15]


def test_invalid_arguments():
    with pytest.raises(ValueError, match="6"):
        CAPTIONS.pad([1] * 6)
    for ids in ([10], [-1, 3]):
        with pytest.raises(ValueError, match="vocabulary"):
            CAPTIONS.pad(ids)
    with pytest.raises(ValueError, match="width"):
        TokenLayout(CAPTIONS, 7, 3, 0)
