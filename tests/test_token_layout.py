"""The token stream's ids and positions."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dalle_jax.token_layout import TokenLayout

LAYOUT = TokenLayout(text_vocab=10, image_vocab=7, text_length=5, height=3, width=4)


def test_sizes():
    assert (LAYOUT.image_length, LAYOUT.length, LAYOUT.text_ids, LAYOUT.mask_id) == (12, 17, 15, 7)


@given(st.lists(st.integers(0, 9), max_size=5))
def test_padding_has_an_id_for_each_position(ids):
    padded = LAYOUT.pad_text(ids)
    assert padded.dtype == np.int32 and padded.shape == (5,)
    assert padded.tolist() == ids + [10 + position for position in range(len(ids), 5)]


def test_the_empty_caption_is_padding_everywhere():
    assert LAYOUT.null_text().tolist() == [10, 11, 12, 13, 14] == LAYOUT.pad_text([]).tolist()
    LAYOUT.null_text()[:] = 0
    assert LAYOUT.null_text()[0] == 10, "a caller's change must not affect later calls"


def test_all_padding_is_one_class():
    targets = LAYOUT.text_targets(jnp.array([[0, 9, 12, 13, 14]]))
    assert targets.tolist() == [[0, 9, 10, 10, 10]]


def test_invalid_arguments():
    with pytest.raises(ValueError, match="6"):
        LAYOUT.pad_text([1] * 6)
    for ids in ([10], [-1, 3]):
        with pytest.raises(ValueError, match="vocabulary"):
            LAYOUT.pad_text(ids)
    with pytest.raises(ValueError, match="width"):
        TokenLayout(10, 7, 5, 3, 0)
