"""Single values: whole numbers, finite numbers, seeds."""

import numpy as np
import pytest

from dalle_jax.configuration.values import check_seed, finite, natural, shown
from dalle_jax.errors import ConfigError, DataError

NAN, INFINITY = float("nan"), float("inf")
NOT_NUMBERS = [NAN, INFINITY, -INFINITY, "1", None, True, (), b"1", 10**400, 1 + 0j, np.array([1, 2])]


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 0, -1, 2.5, 2.0, 2**31, np.float32(2), np.True_])
def test_natural_rejects(value):
    with pytest.raises(ConfigError, match="^rows is .* at least 1"):
        natural("rows", value, least=1)


@pytest.mark.parametrize("value", [1, 7, 2**31 - 1, np.int64(3), np.uint8(3)])
def test_natural(value):
    found = natural("rows", value, least=1)
    assert found == value and type(found) is int


@pytest.mark.parametrize("value", [*NOT_NUMBERS, 1.0, -0.1, np.float32("nan")])
def test_finite_rejects(value):
    with pytest.raises(ConfigError, match="^b2 is .* at least 0 and below 1"):
        finite("b2", value, 0, below=1)


@pytest.mark.parametrize("value", [0, 0.5, np.float32(0.25), 1 - 1e-9])
def test_finite(value):
    found = finite("b2", value, 0, below=1)
    assert found == value and type(found) is float


@pytest.mark.parametrize("seed", [*NOT_NUMBERS, -1, 2**32, 2**63, 1.5])
def test_seeds_reject(seed):
    with pytest.raises(DataError, match="^seed is .*4294967295"):
        check_seed(seed, error=DataError)


@pytest.mark.parametrize("seed", [0, 2**32 - 1, np.uint32(5)])
def test_seeds(seed):
    assert check_seed(seed) == seed and type(check_seed(seed)) is int


def test_shown_in_one_line():
    assert shown("a\nb") == repr("a\nb")
    assert "digits" in shown(10**5000)
    assert len(shown("x" * 1000)) < 100 and "\n" not in shown(np.eye(3))
