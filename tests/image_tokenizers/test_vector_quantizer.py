"""Vector quantisation and the renewal of codes against slow loops."""

import jax
import jax.numpy as jnp
import numpy as np

from dalle_jax.image_tokenizers.vector_quantizer import quantize, renew

V, D = 7, 3


def some_features(rows=40, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, D)).astype(np.float32)


def some_codes(seed=1):
    rng = np.random.default_rng(seed)
    return {
        "vectors": rng.normal(size=(V, D)).astype(np.float32),
        "uses": rng.uniform(0.5, 2, V).astype(np.float32),
        "errors": rng.uniform(0, 1, V).astype(np.float32),
    }


def slow(features, vectors):
    """Returns tokens, uses, sums and errors, computed one feature at a time."""
    tokens, uses, sums, errors = [], np.zeros(V), np.zeros((V, D)), np.zeros(V)
    for z in features:
        distances = [sum((a - b) ** 2 for a, b in zip(z, e)) for e in vectors]
        k = min(range(V), key=distances.__getitem__)
        tokens.append(k)
        uses[k] += V / len(features)
        sums[k] += z * V / len(features)
        errors[k] += distances[k] * V / len(features)
    return tokens, uses, sums, errors


def test_quantize_equals_a_loop_over_features():
    features, codes = some_features(), some_codes()["vectors"]
    found = jax.jit(quantize)(features, codes)
    tokens, uses, sums, errors = slow(features, codes)
    np.testing.assert_array_equal(found.tokens, tokens)
    np.testing.assert_allclose(found.vectors, codes[tokens], atol=1e-6)
    np.testing.assert_allclose(found.commitment, np.mean((features - codes[tokens]) ** 2), rtol=1e-5)
    np.testing.assert_allclose(found.statistics["uses"], uses, rtol=1e-5)
    np.testing.assert_allclose(found.statistics["sums"], sums, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.statistics["errors"], errors, rtol=1e-4, atol=1e-5)


def test_the_gradient_passes_straight_through_and_codes_have_none():
    features, codes = some_features(), some_codes()["vectors"]
    weights = some_features(seed=5)
    through, of_codes = jax.grad(lambda z, e: jnp.sum(weights * quantize(z, e).vectors), (0, 1))(features, codes)
    np.testing.assert_allclose(through, weights, rtol=1e-6)
    assert not np.any(of_codes)
    committed = jax.grad(lambda z: quantize(z, codes).commitment)(features)
    tokens = slow(features, codes)[0]
    np.testing.assert_allclose(committed, 2 * (features - codes[tokens]) / features.size, rtol=1e-4, atol=1e-7)


def test_codes_are_running_averages():
    codes, features = some_codes(), some_features()
    new = renew(codes, quantize(features, codes["vectors"]).statistics, jax.random.key(0), decay=0.9, dead_below=0.0)
    _, uses, sums, errors = slow(features, codes["vectors"])
    for k in range(V):
        total = 0.9 * codes["uses"][k] + 0.1 * uses[k]
        mean = (0.9 * codes["uses"][k] * codes["vectors"][k] + 0.1 * sums[k]) / total
        np.testing.assert_allclose(new["vectors"][k], mean, rtol=1e-4)
        np.testing.assert_allclose(new["uses"][k], total, rtol=1e-5)
        np.testing.assert_allclose(new["errors"][k], 0.9 * codes["errors"][k] + 0.1 * errors[k], rtol=1e-4, atol=1e-6)


def test_statistics_of_halves_average_to_those_of_the_batch():
    codes, features = some_codes()["vectors"], some_features()
    halves = [quantize(part, codes).statistics for part in (features[::2], features[1::2])]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    whole = quantize(features, codes).statistics
    for name in whole:
        np.testing.assert_allclose(mean[name], whole[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_a_dead_code_moves_next_to_the_code_with_the_largest_error():
    codes = some_codes()
    codes["vectors"][2] = 100.0  # no feature is near it
    codes["uses"][2] = 0.0
    codes["errors"][:] = 0.0
    features = some_features()
    features[:4] = codes["vectors"][5] + 3 * features[:4]  # its features spread widely
    statistics = quantize(features, codes["vectors"]).statistics
    statistics["errors"] = jnp.zeros(V).at[5].set(1.0)
    kept = renew(codes, statistics, jax.random.key(0), decay=0.9, dead_below=0.0)
    new = renew(codes, statistics, jax.random.key(0), decay=0.9, dead_below=0.05)
    np.testing.assert_allclose(kept["vectors"][2], 100.0)
    assert np.linalg.norm(new["vectors"][2] - new["vectors"][5]) < 2.0
    assert np.any(new["vectors"][2] != new["vectors"][5])
    np.testing.assert_allclose(new["uses"][2], 0.1)
    np.testing.assert_allclose(new["errors"][5], kept["errors"][5] / 2, rtol=1e-6)  # shared with its new neighbour
    others = [k for k in range(V) if k != 2]
    np.testing.assert_array_equal(np.asarray(new["vectors"])[others], np.asarray(kept["vectors"])[others])


def test_nothing_moves_without_errors_and_all_values_are_finite():
    codes = some_codes()
    codes["uses"][:] = 0.0
    codes["errors"][:] = 0.0
    statistics = jax.tree.map(jnp.zeros_like, quantize(some_features(), codes["vectors"]).statistics)
    new = renew(codes, statistics, jax.random.key(0), decay=0.9, dead_below=0.05)
    assert all(np.all(np.isfinite(value)) for value in new.values())
