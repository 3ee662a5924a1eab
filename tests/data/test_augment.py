import fractions

import numpy as np
import pytest

from dalle_jax.data.augment import KINDS, area_resize, augment, fit_square


def coordinates(height, width):
    """Returns an image whose red and green give the row and column of each pixel, so that a test can locate a crop."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows, columns, np.zeros_like(rows)], -1).astype(np.uint8)


def brute_force_area(image, side):
    height, width, channels = image.shape
    result = np.zeros((side, side, channels))
    for i in range(side):
        for j in range(side):
            top, bottom = i * height / side, (i + 1) * height / side
            left, right = j * width / side, (j + 1) * width / side
            total = 0.0
            for r in range(int(top), min(height, int(np.ceil(bottom)))):
                for c in range(int(left), min(width, int(np.ceil(right)))):
                    area = (min(bottom, r + 1) - max(top, r)) * (min(right, c + 1) - max(left, c))
                    result[i, j] += area * image[r, c]
                    total += area
            result[i, j] /= total
    return result


@pytest.mark.parametrize(
    "shape, side", [((7, 7), 3), ((9, 6), 4), ((5, 5), 8), ((6, 6), 3), ((10, 10), 9), ((1, 3), 2)]
)
def test_area_resize_is_the_mean_over_the_area(shape, side):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    resized = area_resize(image, side)
    assert resized.dtype == np.uint8 and resized.shape == (side, side, 3)
    assert np.abs(resized - brute_force_area(image, side)).max() <= 0.5 + 1e-9


def plain_running_sums(image, side):
    """The area average by differences of a float64 running sum over every pixel."""
    for _ in range(2):
        length = image.shape[0]
        running = np.concatenate([np.zeros_like(image[:1], np.float64), np.cumsum(image, axis=0, dtype=np.float64)])
        edges = np.arange(side + 1) * (length / side)
        whole = np.minimum(edges.astype(np.int64), length - 1)
        at_edges = running[whole] + (edges - whole)[:, None, None] * image[whole]
        image = (np.diff(at_edges, axis=0) * (side / length)).swapaxes(0, 1)
    return np.rint(image).astype(np.uint8)


def test_area_resize_is_exact():
    """Bit for bit, because trained runs resume with these pixels."""
    generator = np.random.default_rng(0)
    for _ in range(100):
        height, width, side = generator.integers(1, 90, 3)
        image = generator.integers(0, 256, (height, width, 3)).astype(np.uint8)
        np.testing.assert_array_equal(area_resize(image, side), plain_running_sums(image, side))


def exact_means(image, side, align_corners):
    """The area average in whole numbers; see `area_resize`."""
    sums, area = image.astype(object), 1
    for _ in range(2):
        length = len(sums)
        old, new = (length - 1, side - 1) if align_corners else (length, side)
        units = [[max(0, min((i + 1) * old, (r + 1) * new) - max(i * old, r * new)) for r in range(2 * length)]
                 for i in range(side)]  # fmt: skip
        weights = np.array(units, object)
        weights[:, length - 1] = weights[:, length - 1 :].sum(1)  # the last row repeats
        sums, area = np.tensordot(weights[:, :length], sums, 1).swapaxes(0, 1), area * old
    nearest = lambda value: round(fractions.Fraction(value, area))  # ties to even
    return np.vectorize(nearest)(sums).astype(np.uint8)


@pytest.mark.parametrize("shape", [(384, 320), (260, 40), (31, 257)])
@pytest.mark.parametrize("side", [5, 12])
@pytest.mark.parametrize("align_corners", [False, True])
def test_large_images_have_exact_means(shape, side, align_corners):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    resized = area_resize(image, side, align_corners=align_corners)
    assert resized.flags.c_contiguous
    np.testing.assert_array_equal(resized, exact_means(image, side, align_corners))


@pytest.mark.parametrize("shape, side", [((480, 480), 256), ((427, 427), 272)])
def test_large_images_differ_at_ties_only(shape, side):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 1), np.uint8)
    difference = area_resize(image, side).astype(int) - plain_running_sums(image, side)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 0.002


def test_sums_of_a_very_large_image_do_not_overflow():
    """Its area times 255 is more than int32 holds."""
    np.testing.assert_array_equal(area_resize(np.full((2903, 2909, 1), 255, np.uint8), 4), 255)


def test_area_resize_keeps_what_fits():
    image = coordinates(8, 8)
    assert area_resize(image, 8) is image
    np.testing.assert_array_equal(area_resize(np.full((37, 37, 3), 255, np.uint8), 11), 255)


def tensorflow_area(image, side):
    """TensorFlow's `ResizeMethod.AREA` with `align_corners=True`, pixel by pixel as its kernel is defined."""

    def weights(length):
        scale = (length - 1) / (side - 1)
        table = np.zeros((side, length))
        for new in range(side):
            low, high = new * scale, (new + 1) * scale
            for old in range(int(np.floor(low)), int(np.ceil(high))):
                table[new, min(old, length - 1)] += (min(high, old + 1) - max(low, old)) / scale
        return table

    return np.einsum("ir,js,rsc->ijc", weights(image.shape[0]), weights(image.shape[1]), image.astype(float))


@pytest.mark.parametrize("shape, side", [((7, 7), 3), ((9, 6), 4), ((40, 40), 27), ((10, 10), 9), ((5, 5), 8)])
def test_area_resize_with_aligned_corners_is_that_of_the_listings(shape, side):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    resized = area_resize(image, side, align_corners=True)
    assert resized.dtype == np.uint8 and resized.shape == (side, side, 3)
    assert np.abs(resized - tensorflow_area(image, side)).max() <= 0.5 + 1e-9
    np.testing.assert_array_equal(resized[-1, -1], image[-1, -1])
    assert (resized != area_resize(image, side)).any()


@pytest.mark.parametrize("kind, aligned", [("dvae", True), ("prior", True), ("clip", False), ("none", False)])
def test_only_the_papers_listings_align_corners(kind, aligned, monkeypatch):
    seen = []

    def spy(image, side, align_corners=False):
        seen.append(align_corners)
        return image[:side, :side]

    monkeypatch.setattr("dalle_jax.data.augment.area_resize", spy)
    augment(coordinates(80, 100), 16, kind, np.random.default_rng(0))
    assert seen == [aligned]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(16, 16), (40, 100), (90, 31), (200, 200), (5, 9), (1, 1)])
def test_any_image_gives_the_requested_size(kind, shape):
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3)).astype(np.uint8)
    for seed in range(5):
        result = augment(image, 16, kind, np.random.default_rng(seed))
        assert result.shape == (16, 16, 3) and result.dtype == np.uint8
        np.testing.assert_array_equal(result, augment(image, 16, kind, np.random.default_rng(seed)))


def resize_sides(kind, size, short, monkeypatch):
    """Returns the sides t drawn with many seeds."""
    sides = []
    monkeypatch.setattr(
        "dalle_jax.data.augment.area_resize", lambda image, side, **_: sides.append(side) or image[:side, :side]
    )
    image = coordinates(short, short + 20)
    for seed in range(600):
        augment(image, size, kind, np.random.default_rng(seed))
    return sides


def test_dvae_resizes_to_nine_to_twelve_eighths(monkeypatch):
    sides = resize_sides("dvae", 64, 200, monkeypatch)
    assert min(sides) == 72 and max(sides) == 96  # 9/8 and 12/8 of 64, both ends included
    assert set(sides) == set(range(72, 97))
    assert np.mean(sides) == pytest.approx(84, abs=1.5)


def test_prior_resizes_to_eight_to_nine_eighths(monkeypatch):
    sides = resize_sides("prior", 64, 200, monkeypatch)
    assert set(sides) == set(range(64, 73))


def test_nothing_is_enlarged_to_be_cropped(monkeypatch):
    assert set(resize_sides("dvae", 64, 80, monkeypatch)) == set(range(72, 81))
    assert set(resize_sides("dvae", 64, 64, monkeypatch)) == {64}


def first_crops(kind, height, width, count=800):
    """Returns crops without a resize, because the size is the short side of the image."""
    image = coordinates(height, width)
    return [augment(image, min(height, width), kind, np.random.default_rng(seed)) for seed in range(count)]


def test_dvae_crops_anywhere_and_flips_half():
    crops = first_crops("dvae", 16, 56)
    flipped = np.array([crop[0, 0, 1] > crop[0, -1, 1] for crop in crops])
    assert flipped.mean() == pytest.approx(0.5, abs=0.06)
    assert {int(crop[0, :, 1].min()) for crop in crops} == set(range(41))  # offsets 0 to 56 - 16, all of them


def test_prior_crops_near_the_centre_and_never_flips():
    crops = first_crops("prior", 16, 56)
    assert all(crop[0, 0, 1] < crop[0, -1, 1] for crop in crops)
    # The slack is 40: offsets from 3/8 of it up to, not including, 5/8.
    assert {int(crop[0, 0, 1]) for crop in crops} == set(range(15, 25))
    tall = first_crops("prior", 56, 16)
    assert {int(crop[0, 0, 0]) for crop in tall} == set(range(15, 25))


@pytest.mark.parametrize("height, width, axis", [(16, 56, 1), (56, 16, 0)])
def test_clip_crops_a_square_anywhere_and_never_flips(height, width, axis):
    crops = first_crops("clip", height, width)
    assert all(crop[0, 0, axis] + 15 == crop[-1, -1, axis] for crop in crops)
    assert {int(crop[0, 0, axis]) for crop in crops} == set(range(41))  # offsets 0 to 56 - 16, all of them


def test_clip_keeps_the_whole_short_side(monkeypatch):
    assert set(resize_sides("clip", 64, 200, monkeypatch)) == {64}
    square = np.random.default_rng(0).integers(0, 256, (50, 50, 3)).astype(np.uint8)
    result = augment(square, 20, "clip", np.random.default_rng(0))
    np.testing.assert_array_equal(result, augment(square, 20, "none", None))


def test_none_is_the_centre():
    crop = augment(coordinates(16, 56), 16, "none", None)
    assert crop[0, 0, 1] == 20 and crop[0, -1, 1] == 35 and crop[-1, 0, 0] == 15


@pytest.mark.parametrize(("shape", "place"), [((4, 10), (3, 0)), ((10, 5), (0, 2)), ((6, 6), (0, 0))])
def test_padding_keeps_the_whole_image_in_the_centre(shape, place):
    image = np.random.default_rng(0).integers(0, 200, (*shape, 3), np.uint8)
    side = max(shape)
    expected = np.full((side, side, 3), 255, np.uint8)
    expected[place[0] : place[0] + shape[0], place[1] : place[1] + shape[1]] = image
    np.testing.assert_array_equal(fit_square(image, "pad"), expected)
    np.testing.assert_array_equal(fit_square(image, "crop"), image)


def test_unknown_kind():
    with pytest.raises(ValueError, match="flip"):
        augment(coordinates(8, 8), 8, "flip", None)
