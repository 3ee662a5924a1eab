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
