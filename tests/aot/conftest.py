"""Programs are compiled with the precision that users have. That of the other tests takes several passes."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def default_precision():
    with jax.default_matmul_precision("default"):
        yield
