"""Processes of the test session drop their compiled programs before they reach Linux's limit of memory mappings."""

import sys

import compiled_programs
import jax
import jax.numpy as jnp
import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="counts the mappings in /proc")
def test_programs_are_dropped_above_the_limit():
    double = jax.jit(lambda x: x * 2)
    double(jnp.ones(3))
    compiled_programs.forget(limit=10**9)
    assert double._cache_size() == 1
    compiled_programs.forget(limit=0)
    assert double._cache_size() == 0
    assert double(jnp.ones(3)).sum() == 6
