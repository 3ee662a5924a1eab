"""The order of the test files."""

import longest_first


def test_the_files_that_come_first_exist():
    """A renamed file would otherwise lose its place without notice."""
    assert [name for name in longest_first.FILES if not (longest_first.FOLDER / name).is_file()] == []
    assert len(set(longest_first.FILES)) == len(longest_first.FILES)
