"""PSNR against its definition, SSIM against that of scikit-image."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from skimage.metrics import structural_similarity

from dalle_jax.errors import DataError
from dalle_jax.metrics import image_quality


def pairs(count=8, height=21, width=34):
    """Returns smooth images and copies with falling noise; the last pair is flat and equal."""
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


def test_each_image():
    images, others = pairs()
    psnr, ssim = expected(images, others)
    assert psnr[0] < 20 and psnr[-1] == 100 and ssim[0] < 0.5 and ssim[-1] == 1
    np.testing.assert_allclose(image_quality.psnr(images, others), psnr, rtol=1e-5)
    np.testing.assert_allclose(image_quality.ssim(images, others), ssim, atol=1e-5)
    np.testing.assert_allclose(image_quality.ssim(others, images), ssim, atol=1e-5)


def test_parts_shards_and_filled_up_batches():
    """All batches have eight rows, so that nothing is compiled again."""
    sides = pairs()
    psnr, ssim = (values[:5].mean() for values in expected(*sides))
    filled = [np.concatenate([x[:5], y[:3]]) for x, y in (sides, sides[::-1])]
    rows = np.arange(8)
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    part = lambda kept: image_quality.add(image_quality.empty(), *filled, kept)
    for stats in (
        part(rows < 5),
        image_quality.merge(part((rows >= 3) & (rows < 5)), part(rows < 3)),
        image_quality.add(part(rows < 1), *filled, (rows >= 1) & (rows < 5)),
        image_quality.add(image_quality.empty(), *(jax.device_put(x, sharding) for x in (*filled, rows < 5))),
    ):
        assert stats.count == 5
        np.testing.assert_allclose(image_quality.compute(stats)["psnr"], psnr, rtol=1e-5)
        np.testing.assert_allclose(image_quality.compute(stats)["ssim"], ssim, rtol=1e-5)
    whole = image_quality.add(image_quality.empty(), *sides)
    assert whole.count == 8 and image_quality.compute(whole)["psnr"] > psnr


def test_invalid_inputs_are_rejected():
    images, others = pairs()
    with pytest.raises(ValueError, match="uint8"):
        image_quality.psnr(images, others[:, :-1])
    with pytest.raises(ValueError, match="uint8"):
        image_quality.psnr(images, others.astype(np.float32))
    with pytest.raises(ValueError, match="11"):
        image_quality.ssim(images[:, :10], others[:, :10])
    with pytest.raises(DataError, match="PSNR"):
        image_quality.compute(image_quality.empty())
