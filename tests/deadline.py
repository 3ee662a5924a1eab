"""The end of the time for tests: `DALLE_JAX_TESTS_UNTIL`, in seconds since 1970. `.ci/run` sets it for long tests."""

from collections.abc import Mapping

VARIABLE = "DALLE_JAX_TESTS_UNTIL"


def is_over(environment: Mapping[str, str], now: float) -> bool:
    """Returns whether no further test may begin. Without the variable, there is always time."""
    return now > float(environment.get(VARIABLE) or "inf")
