"""Corrupted images: which squares are replaced, from where, and when no replacement is visible."""

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


def draw_images(rows=6, size=16, seed=0):
    """Images of squares in a few flat colours, so that many squares are equal; one differs in two pixels."""
    rng = np.random.default_rng(seed)
    colors = np.array([[0, 0, 0], [60, 0, 0], [0, 200, 0]], np.uint8)
    images = colors[rng.integers(0, 3, (rows, 4, 4))].repeat(size // 4, 1).repeat(size // 4, 2)
    images[0, :2, 0] = 255
    return images


def squares(image):
    """Splits an image into squares, [16, 4, 4, 3]."""
    return image.reshape(4, 4, 4, 4, 3).swapaxes(1, 2).reshape(16, 4, 4, 3)


def shows(one, other):
    """Returns whether a quarter of a square's pixels differ by more than 64 in a channel."""
    return sum(any(abs(int(a) - int(b)) > 64 for a, b in zip(p, q)) for p, q in zip(one, other)) >= len(one) / 4


@functools.cache
def drawn():
    """For 40 keys, the source row of each copy and the replaced squares of each image."""
    images, found = draw_images(), []
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


def test_squares_are_replaced_by_those_of_one_other_image():
    images = draw_images()
    for fitting, exchanged, valid in drawn():
        assert fitting, "squares that no other row of the batch has there"
        for row in range(6):
            assert len(exchanged[row]) <= OPTIONS.squares and valid[row] == bool(exchanged[row])
            for i in exchanged[row]:
                other = squares(images[(row + fitting[0]) % 6])[i]
                assert shows(squares(images[row])[i].reshape(-1, 3), other.reshape(-1, 3))


def test_every_row_place_and_number_occurs():
    shifts = {fitting[0] for fitting, _, _ in drawn() if len(fitting) == 1}
    places = {i for _, exchanged, _ in drawn() for row in exchanged for i in row}
    numbers = {len(row) for _, exchanged, _ in drawn() for row in exchanged}
    assert shifts == set(range(1, 6)) and places == set(range(16)) and numbers >= set(range(1, OPTIONS.squares + 1))


def test_no_image_is_corrupted_with_itself():
    images = np.full((3, 16, 16, 3), 100, np.uint8) * np.arange(3, dtype=np.uint8)[:, None, None, None]
    assert all(spoiled(images, jax.random.key(seed), OPTIONS)[1].all() for seed in range(20))


def test_invisible_replacements_are_not_made():
    images = np.full((4, 16, 16, 3), 100, np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
    made, valid = spoiled(images, jax.random.key(0), OPTIONS)
    assert not valid.any()
    np.testing.assert_array_equal(made, images[:, None].repeat(3, 1))


def test_copies_are_functions_of_the_key_and_differ():
    one, again, other = (spoiled(draw_images(), jax.random.key(seed), OPTIONS)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any() and (one[:, 0] != one[:, 1]).any()


def test_the_same_on_a_mesh():
    images, key = draw_images(16), jax.random.key(3)
    expected = jax.device_get(spoiled(images, key, OPTIONS))
    with on_mesh(mesh := make_mesh()):
        made = spoiled(to_mesh(images, batch_sharding(mesh)), key, OPTIONS)
    for a, b in zip(jax.device_get(made), expected):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "values, token",
    [
        ({"spoiled": -1}, "spoiled"),
        ({"grid": 1}, "grid"),
        ({"squares": 0}, "squares"),
        ({"grid": 2, "squares": 4}, "squares"),
    ],
)
def test_invalid_options(values, token):
    with pytest.raises(ConfigError, match=token):
        NegativeOptions(**values)


def test_options_that_do_not_fit_the_data():
    NegativeOptions(spoiled=0).check(image_size=30, batch_size=1)
    with pytest.raises(ConfigError, match="grid"):
        NegativeOptions(spoiled=1).check(image_size=30, batch_size=4)
    with pytest.raises(ConfigError, match="batch_size"):
        NegativeOptions(spoiled=1).check(image_size=32, batch_size=1)
