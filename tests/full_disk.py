"""A disk that is full for some files."""

import os

import pytest

needs_full_device = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no disk to be full")


def fill_disk(monkeypatch, name):
    """Writes of files that begin with `name` fail as on a full disk."""

    def full(path, mode):
        return open("/dev/full", "wb") if os.path.basename(path).startswith(name) else open(path, mode)

    monkeypatch.setattr("dalle_jax.storage.files.open", full, raising=False)
