"""Precision and recall against loops over single images, and against torch-fidelity."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from torchvision_on_cpu import import_torchvision

from dalle_jax.errors import DataError
from dalle_jax.metrics import precision_recall


def reservoir(rows, name="test"):
    return precision_recall.add(precision_recall.empty(rows.shape[1], name), rows)


def sets(width=5):
    rng = np.random.default_rng(0)
    real = rng.normal(size=(70, width)) * np.geomspace(2, 0.3, width)
    generated = rng.normal(size=(45, width)) * np.geomspace(1.5, 0.5, width) + 0.6
    return real.astype(np.float32), generated.astype(np.float32)


def by_hand(points, others, k):
    """Computes the share of `others` that lie in the ball around any of `points`."""
    distance = lambda a, b: float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)))
    radii = [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]
    return np.mean([any(distance(o, p) <= r for p, r in zip(points, radii)) for o in others])


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1000, 16])
def test_the_value_equals_the_definition(k, chunk):
    real, generated = sets()
    expected = by_hand(real, generated, k), by_hand(generated, real, k)
    assert all(0.05 < value < 0.95 for value in expected) and expected[0] != expected[1]
    measured = precision_recall.compute(reservoir(real), reservoir(generated), k, chunk)
    assert measured == {"precision_test": expected[0], "recall_test": expected[1]}


def test_same_and_distant_sets():
    real, generated = sets()
    shuffled = np.random.default_rng(1).permutation(real)
    offset = np.float32(1e4)  # far from zero
    same = precision_recall.compute(reservoir(real + offset), reservoir(shuffled + offset))
    assert same == {"precision_test": 1, "recall_test": 1}
    apart = precision_recall.compute(reservoir(real), reservoir(generated + 100))
    assert apart == {"precision_test": 0, "recall_test": 0}


def test_duplicates_cover_only_themselves():
    """Rounding depends on the chunk of a row. Without a tolerance, it would put about every tenth draw outside."""
    for seed in range(12):
        rows = np.random.default_rng(seed).normal(size=(40, 300)).astype(np.float32) + 3
        real = np.repeat(rows, 5, axis=0)
        for generated in ([rows, rows + np.float32(1e-3), rows + 5], [rows + np.float32(1e-3), rows + 5, rows[::-1]]):
            measured = precision_recall.compute(reservoir(real), reservoir(np.concatenate(generated)), chunk=7)
            assert measured["precision_test"] == 1 / 3


def test_parts_shards_and_filled_up_batches():
    real, generated = sets()
    whole = precision_recall.compute(reservoir(real), reservoir(generated))
    halves = precision_recall.merge(reservoir(real[:30]), reservoir(real[30:]))
    assert precision_recall.compute(halves, reservoir(generated)) == whole
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    filled = jax.device_put(np.concatenate([real, np.zeros((2, 5), np.float32)]), sharding)
    valid = jax.device_put(np.arange(72) < 70, sharding)
    stats = precision_recall.add(precision_recall.empty(5, "test"), filled, valid)
    np.testing.assert_array_equal(stats.values, real)


# -- float32 with a bound of its error ----------------------------------------------------------------------------


def clusters(scale=1.0):
    """Returns sets whose distances are far below the rounding error of float32 products of their features."""
    rng = np.random.default_rng(0)
    centers = 1000 * np.sign(rng.normal(size=(3, 8)))
    real, generated = (centers[np.arange(count) % 3] + 2.0**-6 * rng.integers(-9, 10, (count, 8)) for count in (53, 41))
    return np.float32(real * scale), np.float32(generated * scale)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1000, 16, 7])
def test_distances_that_float32_cannot_tell_apart(k, chunk):
    real, generated = clusters()
    expected = by_hand(real, generated, k), by_hand(generated, real, k)
    assert all(0.05 < value < 0.99 for value in expected) and expected[0] != expected[1]
    measured = precision_recall.compute(reservoir(real), reservoir(generated), k, chunk)
    assert measured == {"precision_test": expected[0], "recall_test": expected[1]}


@pytest.mark.parametrize("exponent", [-90, 70])
@pytest.mark.parametrize("draw", [sets, clusters])
def test_features_whose_squares_are_outside_of_float32(draw, exponent):
    """Scaling by a power of two is exact, so that it does not change the values."""
    real, generated = draw()
    expected = precision_recall.compute(reservoir(real), reservoir(generated), chunk=16)
    scaled = [np.ldexp(rows, exponent) for rows in (real, generated)]
    assert precision_recall.compute(*map(reservoir, scaled), chunk=16) == expected
    assert 0 < expected["precision_test"] < 1


@pytest.mark.parametrize("chunk", [1000, 16, 7])
@pytest.mark.parametrize("count, k", [(70, 3), (70, 1), (9, 3), (4, 3), (2, 1)])
def test_radii_equal_those_of_all_distances(count, k, chunk):
    for rows in (sets()[0][:count], clusters()[0][:count], np.repeat(sets()[0], 20, axis=0)[:count]):
        distances = np.square(rows[:, None].astype(np.float64) - rows).sum(2)
        expected = np.sort(distances, axis=1)[:, k]
        np.testing.assert_allclose(reservoir(rows).squared_radii(k, chunk), expected, rtol=1e-12, atol=1e-9)


def test_most_distances_need_no_float64(monkeypatch):
    """Otherwise the blocks in float32 would save nothing."""
    pairs, exact = [], precision_recall._Points.exact
    monkeypatch.setattr(precision_recall._Points, "exact_block", lambda *_: pytest.fail("a block in float64"))
    monkeypatch.setattr(precision_recall._Points, "exact", lambda *a: pairs.append(len(a[1])) or exact(*a))
    rng = np.random.default_rng(0)
    real, generated = (rng.normal(size=(count, 64)).astype(np.float32) for count in (500, 300))
    precision_recall.compute(reservoir(real), reservoir(generated), chunk=128)
    candidates = 8 * (len(real) + len(generated))
    assert candidates <= sum(pairs) < candidates + 100


def test_the_radii_of_the_real_images_are_computed_once(monkeypatch):
    calls, radii = [], precision_recall._squared_radii
    monkeypatch.setattr(precision_recall, "_squared_radii", lambda *a: calls.append(len(a[0])) or radii(*a))
    real, generated = map(reservoir, sets())
    for _ in range(3):
        precision_recall.compute(real, generated)
    assert sorted(calls) == [45, 70]
    precision_recall.compute(real, generated, neighbors=1)
    assert sorted(calls) == [45, 45, 70, 70]


def test_features_that_are_added_are_not_copied_again():
    real, _ = sets()
    stats = precision_recall.empty(5, "test", count=70)
    for start in range(0, 70, 10):
        earlier, stats = stats, precision_recall.add(stats, real[start : start + 10])
        assert not start or np.shares_memory(earlier.values, stats.values)
    np.testing.assert_array_equal(stats.values, real)


def test_agrees_with_torch_fidelity():
    import_torchvision()
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity==0.4.0 (--no-deps)")
    import torch
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    real, generated = sets(12)
    # Since 0.4 that package takes the generated images first.
    expected = calculate_precision_recall_full(torch.tensor(generated), torch.tensor(real))
    measured = precision_recall.compute(reservoir(real), reservoir(generated))
    np.testing.assert_allclose((measured["precision_test"], measured["recall_test"]), expected, rtol=1e-6)


def test_invalid_inputs_are_rejected():
    real, generated = sets()
    with pytest.raises(DataError, match="3 generated"):
        precision_recall.compute(reservoir(real), reservoir(generated[:3]))
    with pytest.raises(ValueError, match="features"):
        precision_recall.compute(reservoir(real), reservoir(generated, "other"))
    with pytest.raises(ValueError, match="features"):
        precision_recall.add(reservoir(real), generated[:, :3])
    with pytest.raises(ValueError, match="finite"):
        precision_recall.add(reservoir(real), np.full((2, 5), np.nan))
