"""Masking: exact counts, ties, and orders of unmasking."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_jax.priors import masking, orders
from dalle_jax.priors.condition import Text
from dalle_jax.token_layout import TokenLayout

SCHEDULES = [*masking.SCHEDULES, "pow2", "pow3", "pow0.5"]
every_schedule = pytest.mark.parametrize("name", SCHEDULES)

# γ(r) for n tokens in float64, from the reference code and figure 3 of the paper.
GAMMA = {
    "cosine": lambda r, n: np.cos(np.pi * r / 2),
    "linear": lambda r, n: 1 - r,
    "log": lambda r, n: -np.log2(np.maximum(r, 1e-300)) / np.log2(n),
    "exp": lambda r, n: 1 - 2.0 ** (-np.log2(n) * (1 - r)),
    "arccos": lambda r, n: np.arccos(r) / (np.pi / 2),
    "pow2": lambda r, n: 1 - r**2,
    "pow3": lambda r, n: 1 - r**3,
    "pow0.5": lambda r, n: 1 - np.sqrt(r),
}


def unmasked(name, steps, unknown):
    """Returns the number of tokens that each step unmasks, int [steps, rows]."""
    now, fixed = np.array(unknown), []
    for t in range(steps):
        left = np.asarray(masking.still_masked(name, jnp.int32(t), steps, jnp.array(unknown), jnp.array(now)))
        fixed.append(now - left)
        now = left
    return np.array(fixed)


@every_schedule
def test_share_is_the_formula_and_falls(name):
    ratio = np.linspace(0, 1, 101)
    for count in (16, 256, 1024):
        share = np.asarray(masking.masked_share(name, ratio, count))
        np.testing.assert_allclose(share, np.clip(GAMMA[name](ratio, count), 1e-6, 1), atol=1e-5)
        assert (np.diff(share) <= 0).all() and share[0] > 0.9 and share[-1] < 1e-3


def test_step_counts_of_the_paper():
    assert unmasked("cosine", 8, [256])[:, 0].tolist() == [5, 15, 24, 31, 39, 45, 48, 49]


@settings(max_examples=60, deadline=None, database=None)
@given(st.sampled_from(SCHEDULES), st.integers(1, 40), st.lists(st.integers(0, 300), min_size=1, max_size=4))
def test_every_token_is_unmasked_once(name, steps, unknown):
    """Each row follows its own count. Each step but the last unmasks at least one token and leaves at least one."""
    fixed = unmasked(name, steps, unknown)
    assert (fixed >= 0).all() and (fixed.sum(0) == unknown).all()
    before = np.array(unknown) - fixed.cumsum(0) + fixed
    for t in range(steps - 1):
        more = before[t] > 1
        assert (fixed[t][more] >= 1).all() and (before[t] - fixed[t] >= 1)[before[t] > 0].all()
    # Exactly ⌊n·γ⌋ stay masked, unless a bound applies or float32 rounding decides.
    for t in range(steps - 1):
        for row, n in enumerate(unknown):
            planned = n * np.clip(GAMMA[name]((t + 1) / steps, max(n, 2)), 1e-6, 1)
            if abs(planned - round(planned)) > 1e-2 and 1 <= int(planned) <= before[t, row] - 1:
                assert before[t, row] - fixed[t, row] == int(planned)


@every_schedule
def test_training_counts(name):
    ratio = np.linspace(0, 1, 51)
    counts = np.asarray(masking.training_counts(name, ratio, 64))
    np.testing.assert_array_equal(
        counts, np.maximum(1, np.floor(64 * np.clip(GAMMA[name](ratio, 64), 1e-6, 1) + 1e-3)).astype(int)
    )
    assert counts.min() == 1 and counts.max() >= 63


def test_drawn_ratios_follow_the_schedule():
    """The histogram of masked shares is that of γ(U(0, 1))."""
    ratio = jax.random.uniform(jax.random.key(0), (20_000,))
    share = np.asarray(masking.training_counts("cosine", ratio, 256)) / 256
    for edge in (0.2, 0.5, 0.8, 0.95):
        np.testing.assert_allclose((share <= edge).mean(), 1 - np.arccos(edge) * 2 / np.pi, atol=0.02)


def test_random_masks_are_exact_uniform_and_differ():
    counts = jnp.arange(1, 65)
    mask = np.asarray(masking.random_mask(jax.random.key(0), counts, 64))
    np.testing.assert_array_equal(mask.sum(1), counts)
    many = np.asarray(masking.random_mask(jax.random.key(1), jnp.full(4000, 16), 64))
    assert len(np.unique(many, axis=0)) > 3990
    np.testing.assert_allclose(many.mean(0), 0.25, atol=0.03)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ranks_under_ties(dtype):
    equal = jnp.zeros((2, 9), dtype)
    np.testing.assert_array_equal(masking.ranks(equal), np.tile(np.arange(9), (2, 1)))
    some = jnp.array([[3.0, 1.0, 3.0, jnp.inf, 1.0, 2.0]], dtype)
    np.testing.assert_array_equal(masking.ranks(some), [[3, 0, 4, 5, 1, 2]])


def test_the_choice_temperature_falls_linearly():
    confidence, noise = jnp.zeros((1, 4)), jnp.ones((1, 4))
    order = masking.Confidence(4.5)
    steps = [float(order.scores(confidence, noise, (t + 1) / 8)[0, 0]) for t in range(8)]
    np.testing.assert_allclose(steps, 4.5 * (1 - (np.arange(8) + 1) / 8), atol=1e-6)


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (5, 3), (8, 8), (16, 16), (32, 32)])
def test_halton_covers_every_cell_once_and_spreads(grid):
    cells = orders.halton(*grid)
    assert sorted(cells) == list(range(grid[0] * grid[1]))
    if grid == (16, 16):  # a quarter of the cells has about four in each of sixteen tiles
        row, column = np.divmod(cells[:64], 16)
        assert set(np.bincount(4 * (row // 4) + column // 4, minlength=16)) <= {3, 4, 5}
    layout = TokenLayout(Text(2, 1), 2, *grid)
    nothing = jnp.zeros((2, len(cells)))
    scores = np.asarray(masking.unmasking_order("halton", layout, 1.0).scores(nothing, nothing, 0.5))
    np.testing.assert_array_equal(np.argsort(-scores, axis=1), np.tile(cells, (2, 1)))


def test_cell_orders():
    layout = TokenLayout(Text(2, 1), 2, 4, 5)
    keys = jax.random.split(jax.random.key(0), 3)
    for name in orders.NAMES:
        cells = np.asarray(orders.cells(name, keys, layout))
        np.testing.assert_array_equal(np.sort(cells, axis=1), np.tile(np.arange(20), (3, 1)))
        tokens = 100 + cells
        np.testing.assert_array_equal(orders.to_raster(tokens, cells), np.tile(100 + np.arange(20), (3, 1)))
    scattered = orders.cells("random", keys, layout)
    assert len(np.unique(scattered, axis=0)) == 3
    known = np.random.default_rng(0).random((3, 20)) < 0.4
    front = np.asarray(orders.given_first(scattered, known))
    for row, cells in enumerate(front):
        count = known[row].sum()
        assert known[row, cells[:count]].all() and not known[row, cells[count:]].any()
        kept = [c for c in np.asarray(scattered[row]) if not known[row, c]]
        assert cells[count:].tolist() == kept, "the others keep their order"


def test_diagonal_orders():
    """Diagonal after diagonal; the cells of each one are shuffled in training, and each may be first or last."""
    layout = TokenLayout(Text(2, 1), 2, 3, 4)
    plain = np.asarray(orders.cells("diagonal", jax.random.split(jax.random.key(0), 2), layout))
    assert plain.tolist() == [[0, 1, 4, 2, 5, 8, 3, 6, 9, 7, 10, 11]] * 2
    shuffled = np.asarray(orders.shuffled_diagonals(jax.random.key(0), 500, layout))
    for start, end in ((0, 1), (1, 3), (3, 6), (6, 9), (9, 11), (11, 12)):
        np.testing.assert_array_equal(np.sort(shuffled[:, start:end], axis=1), np.tile(plain[0, start:end], (500, 1)))
        assert set(shuffled[:, start]) == set(shuffled[:, end - 1]) == set(plain[0, start:end])


@pytest.mark.parametrize("grid", [(1, 7), (3, 4), (8, 8), (32, 32)])
def test_groups_of_diagonals(grid):
    """All tokens once; whole diagonals in h + w - 1 steps, parts of one with more steps, and several with fewer."""
    layout = TokenLayout(Text(2, 1), 2, *grid)
    cells = np.asarray(orders.cells("diagonal", jax.random.split(jax.random.key(0), 1), layout))[0]
    diagonal = cells // grid[1] + cells % grid[1]
    natural = sum(grid) - 1
    for steps in {1, natural // 2, natural - 1, natural, natural + 1, 2 * natural, layout.image_length}:
        if not 1 <= steps <= layout.image_length:
            continue
        ends = orders.diagonal_groups(steps, layout)
        assert ends.shape == (steps + 1,) and ends[0] == 0 and ends[-1] == layout.image_length
        assert (np.diff(ends) > 0).all()
        groups = [set(diagonal[first:end]) for first, end in itertools.pairwise(ends)]
        if steps >= natural:
            assert all(len(group) == 1 for group in groups)
        else:
            assert all(not a & b for a, b in itertools.pairwise(groups)), "no diagonal is split"
        if steps == natural:
            assert np.diff(ends).max() == min(grid)
    if grid == (8, 8):
        assert np.diff(orders.diagonal_groups(16, layout)).tolist() == [1, 2, 3, 4, 5, 6, 7, 4, 4, 7, 6, 5, 4, 3, 2, 1]
        assert np.diff(orders.diagonal_groups(64, layout)).tolist() == [1] * 64


@pytest.mark.parametrize("side", [3, 5])
def test_neighbours_are_the_known_tokens_around_a_cell(side):
    layout = TokenLayout(Text(2, 1), 99, 4, 5)
    rng = np.random.default_rng(0)
    cells = np.stack([rng.permutation(20) for _ in range(3)])
    asked, seen, tokens = rng.integers(0, 20, (3, 7)), rng.integers(0, 21, (3, 7)), rng.integers(0, 99, (3, 20))
    found = np.asarray(orders.neighbours(tokens, np.argsort(cells, axis=1), asked, seen, side, layout))
    assert found.shape == (3, 7, side**2 - 1)
    for b, p in np.ndindex(3, 7):
        known = {divmod(int(cell), 5): token for cell, token in zip(cells[b, : seen[b, p]], tokens[b])}
        row, column = divmod(int(asked[b, p]), 5)
        around = range(-(side // 2), side // 2 + 1)
        expected = [known.get((row + i, column + j), 99) for i in around for j in around if (i, j) != (0, 0)]
        assert found[b, p].tolist() == expected
    assert orders.neighbours(tokens, cells, asked, seen, 0, layout) is None


def test_the_share_of_random_orders():
    layout = TokenLayout(Text(2, 1), 2, 4, 4)
    raster = lambda share: (np.asarray(orders.mixed(jax.random.key(0), 400, layout, share)) == np.arange(16)).all(1)
    assert raster(0.0).all() and not raster(1.0).any()
    np.testing.assert_allclose(raster(0.25).mean(), 0.75, atol=0.06)


@pytest.mark.parametrize("name", ["pow", "pow-1", "sine", ""])
def test_unknown_schedules_are_rejected(name):
    with pytest.raises(ValueError, match=repr(name)):
        masking.check_schedule(name)
