"""The blur against that of scipy, and its radius against that of Pillow."""

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from dalle_jax.metrics import blur

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 24, 33, 3), np.uint8)


@pytest.mark.parametrize("radius", [0.7, *blur.RADII[1:]])
def test_the_filter_is_gaussian(radius):
    ndimage = pytest.importorskip("scipy.ndimage")
    sigma, reach = (0, radius, radius, 0), int(np.ceil(4 * radius))
    expected = ndimage.gaussian_filter(IMAGES.astype(np.float64), sigma, mode="nearest", radius=reach)
    blurred = np.asarray(blur.gaussian_blur(IMAGES, radius))
    assert blurred.dtype == np.uint8
    assert np.abs(blurred - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("radius", blur.RADII[1:])
def test_the_radius_equals_that_of_pillow(radius):
    """Pillow's filter is an approximation, so that only other radii can be distinguished from it."""
    square = np.zeros((65, 65, 3), np.uint8)
    square[20:45, 20:45] = 255

    def by_pillow(r):
        image = PIL.Image.fromarray(square).filter(PIL.ImageFilter.GaussianBlur(r))
        return np.asarray(image, np.float64)

    ours = np.asarray(blur.gaussian_blur(square[None], radius), np.float64)[0]
    error = {r: np.abs(ours - by_pillow(r)).mean() for r in (0.7 * radius, radius, 1.4 * radius)}
    assert error[radius] < 1 and error[radius] < 0.5 * min(error[0.7 * radius], error[1.4 * radius])


def test_extremes():
    np.testing.assert_array_equal(blur.gaussian_blur(IMAGES, 0), IMAGES)
    flat = np.full((1, 8, 8, 3), 201, np.uint8)
    np.testing.assert_array_equal(blur.gaussian_blur(flat, 8), flat)


def test_invalid_inputs_are_rejected():
    with pytest.raises(ValueError, match="-1"):
        blur.gaussian_blur(IMAGES, -1)
    with pytest.raises(ValueError, match="uint8"):
        blur.gaussian_blur(IMAGES[0], 1)
