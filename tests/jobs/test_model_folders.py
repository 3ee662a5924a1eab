"""Names of several workdirs in one key."""

import pytest

from dalle_jax.jobs.evaluate import split_folders


@pytest.mark.parametrize(
    "text, existing, expected",
    [
        ("a", [], ["a"]),
        ("a, b", [], ["a", "b"]),
        ("a,b", ["a,b"], ["a,b"]),
        ("a, b,c", ["a", "b,c"], ["a", "b,c"]),
        ("x,a, b,c", ["a, b"], ["x", "a, b", "c"]),
        (" a ,b", [" a "], [" a ", "b"]),
        ("a,,b", ["a,,b"], ["a,,b"]),
    ],
)
def test_a_comma_in_the_name_of_a_workdir_stays(text, existing, expected):
    assert split_folders(text, existing.__contains__) == expected
