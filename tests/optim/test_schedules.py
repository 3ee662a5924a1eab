"""Schedules: end points, the shapes of the paper, and rejection of invalid sections."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from dalle_jax.errors import ConfigError
from dalle_jax.optim import schedules


def values(spec, steps):
    schedule = schedules.make(spec)
    plain = np.array([schedule(step) for step in steps])
    traced = jax.jit(schedule)(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(plain, traced, rtol=1e-5, atol=1e-7)
    assert traced.dtype == jnp.float32
    return plain


def test_constant():
    np.testing.assert_allclose(values({"kind": "constant", "value": 3}, [0, 1, 10**6]), 3.0)


def test_linear():
    spec = {"kind": "linear", "start": 1.0, "end": 3.0, "steps": 4}
    np.testing.assert_allclose(values(spec, [0, 1, 2, 4, 9]), [1.0, 1.5, 2.0, 3.0, 3.0])


@pytest.mark.parametrize(
    ("start", "end", "steps"), [(0.0, 6.6, 5_000), (1.0, 1 / 16, 150_000), (1e-4, 1.25e-6, 1_200_000)]
)
def test_cosine_is_the_papers(start, end, steps):
    at = [0, steps // 4, steps // 2, steps, 3_000_000]
    expected = [end + (start - end) * (1 + np.cos(np.pi * min(step / steps, 1))) / 2 for step in at]
    np.testing.assert_allclose(
        values({"kind": "cosine", "start": start, "end": end, "steps": steps}, at), expected, rtol=1e-5, atol=1e-7
    )


def test_warmup_constant():
    spec = {"kind": "warmup_constant", "value": 2.0, "warmup_steps": 4}
    np.testing.assert_allclose(values(spec, [0, 1, 4, 50]), [0.0, 0.5, 2.0, 2.0])


def test_warmup_cosine():
    spec = {"kind": "warmup_cosine", "peak": 2.0, "end": 1.0, "warmup_steps": 4, "steps": 12}
    np.testing.assert_allclose(values(spec, [0, 2, 4, 8, 12, 99]), [0.0, 1.0, 2.0, 1.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(values({**spec, "steps": 2}, [0, 1, 2]), [0.0, 0.5, 1.0], rtol=1e-6)


def test_zero_steps_give_the_end_value():
    assert values({"kind": "cosine", "start": 1.0, "end": 2.0, "steps": 0}, [1])[0] == 2.0
    assert values({"kind": "warmup_constant", "value": 2.0, "warmup_steps": 0}, [1])[0] == 2.0


def test_a_config_dict_is_accepted():
    assert schedules.make(ConfigDict({"kind": "constant", "value": 0.5}))(3) == 0.5


@pytest.mark.parametrize(
    ("spec", "token"),
    [
        ({}, "kind"),
        ({"kind": "step"}, "'step'"),
        ({"kind": "constant", "valu": 1}, "'valu'"),
        ({"kind": "constant"}, "value"),
        ({"kind": "constant", "value": "high"}, "'high'"),
        ({"kind": "linear", "start": 0, "end": 1, "steps": -3}, "-3"),
        ({"kind": "linear", "start": 0, "end": 1, "steps": 2.5}, "2.5"),
    ],
)
def test_invalid_sections(spec, token):
    with pytest.raises(ConfigError, match=token):
        schedules.make(spec, "temperature")
