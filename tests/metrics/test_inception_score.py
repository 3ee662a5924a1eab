"""The Inception score from sums, against its definition and against torch-fidelity."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from torchvision_on_cpu import import_torchvision

from dalle_jax.errors import DataError
from dalle_jax.metrics import inception_score

COUNT, CLASSES, SPLITS = 57, 20, 10  # splits of five and six


def random_logits(seed=0):
    return np.random.default_rng(seed).normal(size=(COUNT, CLASSES)).astype(np.float32) * 4


def by_definition(logits, splits=SPLITS):
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    return {"inception_score": np.mean(scores), "inception_score_std": np.std(scores)}


def added(logits, places, batch=COUNT, valid=None):
    stats = inception_score.empty(COUNT, SPLITS, CLASSES)
    for start in range(0, len(logits), batch):
        rows = slice(start, start + batch)
        stats = inception_score.add(stats, logits[rows], places[rows], None if valid is None else valid[rows])
    return stats


def check(stats, expected):
    measured = inception_score.compute(stats)
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-9)


def test_the_score_equals_the_definition_for_any_order_of_batches():
    logits, expected = random_logits(), by_definition(random_logits())
    assert expected["inception_score"] > 2 and expected["inception_score_std"] > 0.1
    order = np.random.default_rng(1).permutation(COUNT)
    check(added(logits, np.arange(COUNT)), expected)
    check(added(logits[order], order, batch=8), expected)


def test_sharded_and_filled_up_batches():
    logits = random_logits()
    filled = np.concatenate([logits, np.full((7, CLASSES), 50, np.float32)])
    places, valid = np.minimum(np.arange(64), COUNT - 1), np.arange(64) < COUNT
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    check(added(filled, places, 16, valid), by_definition(logits))
    check(added(*(jax.device_put(x, sharding) for x in (filled, places)), 64, jax.device_put(valid, sharding)),
          by_definition(logits))  # fmt: skip


def test_extremes():
    sure = np.where(np.eye(4, dtype=bool)[np.arange(40) % 4], 1e4, -1e4)
    stats = inception_score.add(inception_score.empty(40, 2, 4), sure, np.arange(40))
    assert inception_score.compute(stats) == {"inception_score": 4.0, "inception_score_std": 0.0}
    stats = inception_score.add(inception_score.empty(40, 2, 4), np.zeros((40, 4)), np.arange(40))
    np.testing.assert_allclose(inception_score.compute(stats)["inception_score"], 1)


def torch_fidelity_score(logits, splits=SPLITS):
    """Computes (mean, deviation) of logits [N, C] with torch-fidelity."""
    import_torchvision()
    pytest.importorskip("torch_fidelity", reason="needs torch-fidelity==0.4.0 (--no-deps)")
    import torch
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(torch.tensor(logits), splits=splits, shuffle=False)
    return found["inception_score_mean"], found["inception_score_std"]


def test_agrees_with_torch_fidelity():
    logits = random_logits(2)
    measured = inception_score.compute(added(logits, np.arange(COUNT), batch=16))
    np.testing.assert_allclose(list(measured.values()), torch_fidelity_score(logits), rtol=1e-3)


def test_invalid_inputs_are_rejected():
    logits = random_logits()
    stats = added(logits[:50], np.arange(50))
    with pytest.raises(ValueError, match="split"):
        inception_score.compute(stats)
    with pytest.raises(ValueError, match="split"):
        inception_score.compute(inception_score.add(stats, logits[:7], np.arange(7)))
    with pytest.raises(ValueError, match="57"):
        inception_score.add(stats, logits, np.arange(COUNT) + 1)
    with pytest.raises(ValueError, match=r"\[2, 20\]"):
        inception_score.add(stats, logits[:2, :5], np.arange(2))
    with pytest.raises(ValueError, match="finite"):
        inception_score.add(stats, np.full((1, CLASSES), np.inf), np.arange(1))
    with pytest.raises(DataError, match="9 images"):
        inception_score.empty(9)


def test_parts_merged_equal_the_whole():
    logits = random_logits()
    one, other = added(logits[:23], np.arange(23)), added(logits[23:], np.arange(23, COUNT))
    check(inception_score.merge(one, other), by_definition(logits))
    with pytest.raises(ValueError, match="differ"):
        inception_score.merge(one, inception_score.empty(COUNT + 1, SPLITS, CLASSES))
