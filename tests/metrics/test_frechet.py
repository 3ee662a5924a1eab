"""The Fréchet distance against scipy's matrix root, a closed form for few images, and torch-fidelity."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from torchvision_on_cpu import import_torchvision

from dalle_jax.errors import DataError
from dalle_jax.metrics import frechet


def features(count, width, seed=0, offset=0.0):
    """Returns correlated features; some directions are much stronger than others."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * np.geomspace(1, 1e-2, width)
    return (rng.normal(size=(count, width)) @ mixing + offset + rng.normal(size=width)).astype(np.float32)


def statistics(rows, name="test", batch=None):
    stats = frechet.empty(rows.shape[1], name)
    for start in range(0, len(rows), batch or len(rows)):
        stats = frechet.add(stats, rows[start : start + (batch or len(rows))])
    return stats


def test_statistics_are_those_of_numpy():
    rows = features(50, 7)
    stats = statistics(rows, batch=16)
    assert stats.count == 50
    np.testing.assert_allclose(stats.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(stats.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-10)


def test_the_distance_equals_that_of_the_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = features(300, 12, 1), features(200, 12, 2)
    covariances = [np.cov(rows.astype(np.float64), rowvar=False) for rows in (a, b)]
    delta = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    expected = delta @ delta + np.trace(sum(covariances) - 2 * linalg.sqrtm(covariances[0] @ covariances[1]).real)
    assert expected > 1
    np.testing.assert_allclose(frechet.distance(statistics(a), statistics(b)), expected, rtol=1e-9)
    np.testing.assert_allclose(frechet.distance(statistics(b), statistics(a)), expected, rtol=1e-9)


def test_fewer_images_than_features():
    """For centred X [n, D], tr (S1 S2)^½ is the sum of the singular values of X1 X2ᵀ / √((n1 − 1)(n2 − 1))."""
    a, b = (features(count, 64, seed).astype(np.float64) for count, seed in ((20, 1), (9, 2)))
    x, y = (rows - rows.mean(0) for rows in (a, b))
    shared = np.linalg.svd(x @ y.T / np.sqrt(19 * 8), compute_uv=False).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.square(x).sum() / 19 + np.square(y).sum() / 8 - 2 * shared
    np.testing.assert_allclose(frechet.distance(statistics(a), statistics(b)), expected, rtol=1e-9)


@pytest.mark.parametrize("offset", [0, 1000], ids=["", "far from zero"])
@pytest.mark.parametrize(("count", "width"), [(300, 32), (20, 96)], ids=["many", "few"])
def test_a_set_is_at_distance_zero_from_itself_in_any_order(count, width, offset):
    rows = features(count, width, offset=offset)
    shuffled = np.random.default_rng(3).permutation(rows)
    whole = statistics(rows)
    assert np.trace(whole.covariance) > 10
    assert frechet.distance(whole, whole) < 1e-6
    assert frechet.distance(whole, statistics(shuffled, batch=7)) < 1e-6


def test_halves_merged_equal_the_whole():
    rows, other = features(101, 24), statistics(features(60, 24, 1))
    whole = statistics(rows)
    merged = frechet.merge(statistics(rows[:40]), statistics(rows[40:], batch=13))
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.scatter, whole.scatter, rtol=1e-10, atol=1e-9)
    assert frechet.distance(merged, whole) < 1e-6
    np.testing.assert_allclose(frechet.distance(merged, other), frechet.distance(whole, other), rtol=1e-10)
    nothing = frechet.empty(24, "test")
    assert frechet.merge(nothing, whole) is whole and frechet.merge(whole, nothing) is whole


def test_means_far_from_zero_lose_no_precision():
    rows = np.random.default_rng(0).normal(size=(500, 4))
    far = statistics(rows + 1e6, batch=50)
    np.testing.assert_allclose(far.covariance, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-9)


def test_sharded_and_filled_up_batches():
    rows = features(30, 16)
    mesh = jax.make_mesh((8,), ("data",))
    filled = np.concatenate([rows, np.full((2, 16), 1e9, np.float32)])
    valid = np.arange(32) < 30
    sharded, sharded_valid = (jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in (filled, valid))
    whole = statistics(rows)
    for stats in (
        frechet.add(frechet.empty(16, "test"), filled, valid),
        frechet.add(frechet.empty(16, "test"), sharded, sharded_valid),
        frechet.add(whole, filled, np.zeros(32, bool)),
    ):
        assert stats.count == 30
        np.testing.assert_array_equal(stats.scatter, whole.scatter)


def torch_fidelity_distance(a, b):
    """Computes the distance between features [N, D] with torch-fidelity."""
    import_torchvision()
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity==0.4.0 (--no-deps)")
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    theirs = [fid_features_to_statistics(torch.tensor(rows, dtype=torch.float64)) for rows in (a, b)]
    return fid_statistics_to_metric(*theirs, verbose=False)["frechet_inception_distance"]


@pytest.mark.parametrize("counts", [(400, 300), (40, 50)], ids=["many", "few"])
def test_agrees_with_torch_fidelity(counts):
    a, b = features(counts[0], 64, 1), features(counts[1], 64, 2)
    np.testing.assert_allclose(frechet.distance(statistics(a), statistics(b)), torch_fidelity_distance(a, b), rtol=1e-3)


def test_the_name_depends_on_the_features():
    stats = statistics(features(10, 4), "clip")
    assert frechet.compute(stats, stats).keys() == {"fid_clip"}
    assert frechet.empty(2048).metric == "fid"
    with pytest.raises(ValueError, match="512"):
        frechet.empty(512)


def test_invalid_inputs_are_rejected():
    stats = statistics(features(10, 4), "clip")
    with pytest.raises(ValueError, match="different features"):
        frechet.distance(stats, statistics(features(10, 4), "other"))
    with pytest.raises(DataError, match="10 and 1"):
        frechet.distance(stats, statistics(features(1, 4), "clip"))
    with pytest.raises(ValueError, match=r"\(10, 5\)"):
        frechet.add(stats, features(10, 5))
    with pytest.raises(ValueError, match="finite"):
        frechet.add(stats, np.full((2, 4), np.nan))
    with pytest.raises(ValueError, match="valid"):
        frechet.add(stats, features(10, 4), np.ones(9, bool))


# -- rows that wait for a product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7, 64, 101])
def test_blocks_equal_one_product(monkeypatch, batch):
    """Also if neither batches nor blocks divide the number of rows, and if one batch has several blocks."""
    monkeypatch.setattr(frechet, "BLOCK", 16)
    rows = features(101, 24, offset=10)
    stats, halves = statistics(rows, batch=batch), frechet.merge(statistics(rows[:50], batch=7), statistics(rows[50:]))
    for found in (stats, halves):
        assert found.count == 101
        np.testing.assert_allclose(found.mean, rows.mean(0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(found.covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-9)


def test_small_batches_share_a_product(monkeypatch):
    """A product adds a matrix [D, D], which costs more than the rows of a small batch."""
    merged, plus = [], frechet._Moments.plus
    monkeypatch.setattr(frechet._Moments, "plus", lambda a, b: merged.append(b.count) or plus(a, b))
    stats = statistics(features(2 * frechet.BLOCK + 100, 8), batch=16)
    assert merged == [frechet.BLOCK] * 2
    assert stats.scatter.shape == (8, 8) and merged == [frechet.BLOCK] * 2 + [100]


def test_waiting_rows_belong_to_the_statistics():
    """The caller may change its array, and statistics of which others were made stay as they are."""
    rows, more = features(20, 6), features(5, 6, 1)
    expected = statistics(np.concatenate([rows, more])).covariance
    given = rows.copy()
    start = frechet.add(frechet.empty(6, "test"), given)
    given[:] = 0
    one, other = frechet.add(start, more), frechet.add(start, more)
    np.testing.assert_allclose(start.covariance, statistics(rows).covariance, rtol=1e-12)
    for found in (one, other, frechet.add(start, more)):
        assert found.count == 25
        np.testing.assert_allclose(found.covariance, expected, rtol=1e-10)
