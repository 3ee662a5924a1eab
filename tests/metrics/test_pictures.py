"""PSNR against its definition, SSIM against scikit-image's."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from skimage.metrics import structural_similarity

from dalle_jax.errors import DataError
from dalle_jax.metrics import pictures


def pairs(count=5, height=21, width=34):
    """Smooth pictures and noisier and noisier copies; the last one flat and exact."""
    rng = np.random.default_rng(0)
    waves = np.sin(np.arange(height)[:, None, None] / 4) + np.cos(np.arange(width)[:, None] / (3 + np.arange(3)))
    images = np.clip(120 + 50 * waves + rng.normal(size=(count, 1, 1, 3)) * 30, 0, 255)
    images[-1] = 255
    noise = rng.normal(size=images.shape) * np.linspace(40, 0, count)[:, None, None, None]
    return images.astype(np.uint8), np.clip(images + noise, 0, 255).astype(np.uint8)


def expected(images, others):
    error = np.square((images.astype(np.float64) - others) / 255).mean((1, 2, 3))
    similarity = [
        structural_similarity(
            a, b, channel_axis=-1, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for a, b in zip(images, others)
    ]  # fmt: skip
    return -10 * np.log10(np.maximum(error, 1e-10)), np.array(similarity)


def test_each_picture():
    images, others = pairs()
    psnr, ssim = expected(images, others)
    assert psnr[0] < 20 and psnr[-1] == 100 and ssim[0] < 0.5 and ssim[-1] == 1
    np.testing.assert_allclose(pictures.psnr(images, others), psnr, rtol=1e-5)
    np.testing.assert_allclose(pictures.ssim(images, others), ssim, atol=1e-5)
    np.testing.assert_allclose(pictures.ssim(others, images), ssim, atol=1e-5)


def test_parts_shards_and_filled_up_batches():
    images, others = pairs()
    psnr, ssim = expected(images, others)
    means = {"psnr": psnr.mean(), "ssim": ssim.mean()}
    filled = [np.concatenate([x, y[:3]]) for x, y in ((images, others), (others, images))]
    valid = np.arange(8) < 5
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    nothing = pictures.empty()
    for stats in (
        pictures.add(nothing, images, others),
        pictures.merge(pictures.add(nothing, images[3:], others[3:]), pictures.add(nothing, images[:3], others[:3])),
        pictures.add(pictures.add(nothing, images[:1], others[:1]), images[1:], others[1:]),
        pictures.add(nothing, *filled, valid),
        pictures.add(nothing, *(jax.device_put(x, sharding) for x in (*filled, valid))),
    ):
        assert stats.count == 5
        for name, value in pictures.compute(stats).items():
            np.testing.assert_allclose(value, means[name], rtol=1e-5)


def test_what_cannot_be_measured():
    images, others = pairs()
    with pytest.raises(ValueError, match="expected uint8 of one shape"):
        pictures.psnr(images, others[:, :-1])
    with pytest.raises(ValueError, match="expected uint8 of one shape"):
        pictures.psnr(images, others.astype(np.float32))
    with pytest.raises(ValueError, match="at least 11"):
        pictures.ssim(images[:, :10], others[:, :10])
    with pytest.raises(DataError, match="no pictures"):
        pictures.compute(pictures.empty())
