"""Random streams."""

import itertools

import jax

from dalle_jax import keys


def test_streams_are_functions_of_name_and_step():
    root = jax.random.key(0)
    drawn = {
        (name, step): float(jax.random.uniform(keys.stream(root, name, step)))
        for name, step in itertools.product(("init", "loss", "evaluate"), (0, 1, 2, 100_000))
    }
    assert len(set(drawn.values())) == len(drawn)
    traced = jax.jit(lambda step: jax.random.uniform(keys.stream(root, "loss", step)))
    assert float(traced(2)) == drawn["loss", 2]
    assert float(jax.random.uniform(keys.stream(jax.random.key(1), "loss", 2))) != drawn["loss", 2]
