"""Masks of patches: exact counts, blocks that are blocks, and rows that differ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle_jax.models.patch_masks import MASKS, draw_masks

GRID, ROWS = (14, 14), 64
DRAW = jax.jit(draw_masks, static_argnums=(0, 2, 3, 4, 5))


def drawn(kind, count=75, grid=GRID, smallest=16, seed=0):
    return np.asarray(DRAW(kind, jax.random.key(seed), ROWS, grid, count, smallest))


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(
    "count, grid, smallest", [(75, (14, 14), 16), (1, (3, 5), 4), (15, (3, 5), 4), (24, (8, 8), 4)]
)
def test_every_row_masks_the_same_number(kind, count, grid, smallest):
    masks = drawn(kind, count, grid, smallest)
    assert masks.shape == (ROWS, grid[0] * grid[1]) and masks.dtype == bool
    assert (masks.sum(axis=1) == count).all()


def neighbours(masks):
    """The share of pairs of adjacent patches, one of them masked, of which both are masked."""
    grids = masks.reshape(-1, *GRID)
    pairs = [(grids[:, 1:], grids[:, :-1]), (grids[:, :, 1:], grids[:, :, :-1])]
    both, either = (sum(f(a, b).sum() for a, b in pairs) for f in (np.logical_and, np.logical_or))
    return both / either


def test_blocks_are_connected_and_random_patches_are_not():
    """With 75 of 196 patches at random, 0.38² of all pairs are masked on both sides, of 0.62 with a masked one."""
    assert neighbours(drawn("random")) == pytest.approx(0.383**2 / (1 - 0.617**2), abs=0.02)
    assert neighbours(drawn("blocks")) > 0.55


def test_a_single_block_is_a_rectangle():
    """The smallest block is as large as the number of masked patches, so one block is often enough."""
    masks = drawn("blocks", count=16, smallest=16).reshape(-1, *GRID)
    boxes = [np.argwhere(mask) for mask in masks]
    areas = np.array([np.prod(box.max(0) - box.min(0) + 1) for box in boxes])
    assert (areas <= 24).mean() > 0.4 and areas.min() >= 16


def test_rows_differ_and_follow_the_key():
    masks = drawn("blocks")
    assert len({mask.tobytes() for mask in masks}) > ROWS // 2
    np.testing.assert_array_equal(masks, drawn("blocks"))
    assert (masks != drawn("blocks", seed=1)).any()


def test_every_patch_can_be_masked():
    share = np.mean([drawn("blocks", seed=seed).mean(axis=0) for seed in range(4)], axis=0)
    assert share.min() > 0.005 and share.mean() == pytest.approx(75 / 196)


def test_it_is_traced_with_the_batch():
    counts = jax.jit(functools.partial(draw_masks, "blocks", rows=3, grid=(4, 4), count=6, smallest=2))(
        jax.random.key(0)
    )
    assert jnp.sum(counts) == 18
