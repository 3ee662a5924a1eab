"""Spoiled pictures: which squares are exchanged, for what, and when nothing would show."""

import functools

import jax
import numpy as np
import pytest

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import to_mesh
from dalle_jax.distributed.sharding import batch_sharding, on_mesh
from dalle_jax.errors import ConfigError
from dalle_jax.tasks.corrupted_negatives import NegativeOptions, spoil

OPTIONS = NegativeOptions(spoiled=3, grid=4, squares=5)
spoiled = jax.jit(spoil, static_argnums=2)


def pictures(rows=6, size=16, seed=0):
    """Squares of a few flat colours, so that many are equal in two pictures; and one that differs in two pixels."""
    rng = np.random.default_rng(seed)
    colors = np.array([[0, 0, 0], [60, 0, 0], [0, 200, 0]], np.uint8)
    images = colors[rng.integers(0, 3, (rows, 4, 4))].repeat(size // 4, 1).repeat(size // 4, 2)
    images[0, :2, 0] = 255
    return images


def squares(image):
    """[16, 4, 4, 3]."""
    return image.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, 4, 4, 3)


def shows(one, other):
    """Whether a quarter of a square's pixels differ by more than 64 in a channel, pixel by pixel."""
    return sum(any(abs(int(a) - int(b)) > 64 for a, b in zip(p, q)) for p, q in zip(one, other)) >= len(one) / 4


@functools.cache
def drawn():
    """For 40 keys: the row that gives, of each spoiling; squares exchanged, by picture."""
    images, found = pictures(), []
    for seed in range(40):
        made, valid = jax.device_get(spoiled(images, jax.random.key(seed), OPTIONS))
        assert made.dtype == np.uint8 and made.shape == (6, 3, 16, 16, 3) and valid.shape == (6, 3)
        for n in range(3):
            exchanged = [[i for i in range(16) if (a[i] != b[i]).any()] for a, b in
                         ((squares(x), squares(y)) for x, y in zip(images, made[:, n]))]  # fmt: skip
            fitting = [
                shift for shift in range(1, 6)
                if all((squares(made[row, n])[i] == squares(images[(row + shift) % 6])[i]).all()
                       for row in range(6) for i in exchanged[row])
            ]  # fmt: skip
            found.append((fitting, exchanged, valid[:, n]))
    return found


def test_squares_are_exchanged_for_those_of_one_other_picture():
    images = pictures()
    for fitting, exchanged, valid in drawn():
        assert fitting, "squares that no other row of the batch has there"
        for row in range(6):
            assert len(exchanged[row]) <= OPTIONS.squares and valid[row] == bool(exchanged[row])
            for i in exchanged[row]:
                other = squares(images[(row + fitting[0]) % 6])[i]
                assert shows(squares(images[row])[i].reshape(-1, 3), other.reshape(-1, 3))


def test_every_row_place_and_number_comes_up():
    shifts = {fitting[0] for fitting, _, _ in drawn() if len(fitting) == 1}
    places = {i for _, exchanged, _ in drawn() for row in exchanged for i in row}
    numbers = {len(row) for _, exchanged, _ in drawn() for row in exchanged}
    assert shifts == set(range(1, 6)) and places == set(range(16)) and numbers >= set(range(1, OPTIONS.squares + 1))


def test_no_picture_is_spoiled_with_itself():
    images = np.full((3, 16, 16, 3), 100, np.uint8) * np.arange(3, dtype=np.uint8)[:, None, None, None]
    assert all(spoiled(images, jax.random.key(seed), OPTIONS)[1].all() for seed in range(20))


def test_what_does_not_show_is_not_spoiled():
    images = np.full((4, 16, 16, 3), 100, np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
    made, valid = spoiled(images, jax.random.key(0), OPTIONS)
    assert not valid.any()
    np.testing.assert_array_equal(made, images[:, None].repeat(3, 1))


def test_a_function_of_the_key_and_no_two_spoilings_alike():
    one, again, other = (spoiled(pictures(), jax.random.key(seed), OPTIONS)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and (one[:, 0] != one[:, 1]).any()


def test_the_same_on_a_mesh():
    images, key = pictures(16), jax.random.key(3)
    expected = jax.device_get(spoiled(images, key, OPTIONS))
    with on_mesh(mesh := make_mesh()):
        made = spoiled(to_mesh(images, batch_sharding(mesh)), key, OPTIONS)
    for a, b in zip(jax.device_get(made), expected):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"spoiled": -1}, "negatives.spoiled"),
        ({"grid": 1}, "negatives.grid"),
        ({"squares": 0}, "negatives.squares"),
        ({"grid": 2, "squares": 4}, "negatives.squares"),
    ],
)
def test_wrong_numbers_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        NegativeOptions(**values)


def test_what_does_not_fit_the_data_is_refused():
    NegativeOptions(spoiled=0).check(image_size=30, batch_size=1)
    with pytest.raises(ConfigError, match="negatives.grid=8: pictures of 30 pixels .* give a divisor"):
        NegativeOptions(spoiled=1).check(image_size=30, batch_size=4)
    with pytest.raises(ConfigError, match="negatives.spoiled .* batch_size is 1"):
        NegativeOptions(spoiled=1).check(image_size=32, batch_size=1)
