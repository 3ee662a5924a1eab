"""The start of a training opens its data once."""

import collections
import os

import pytest
from own_images import Trained

from dalle_jax.data.sources import open as opening
from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.data.sources.once import once, opened_once
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.jobs import train as train_job
from dalle_jax.training import loop


@pytest.fixture
def listed(monkeypatch, folder):
    """The listings of the folder of images."""
    seen = []
    for name, original in (("scandir", os.scandir), ("listdir", os.listdir)):

        def listing(path=".", original=original, **how):
            if os.path.realpath(path) == os.path.realpath(folder):
                seen.append(path)
            return original(path, **how)

        monkeypatch.setattr(os, name, listing)
    return seen


@pytest.fixture
def read(monkeypatch):
    """The number of times that each image is read."""
    counts = collections.Counter()
    original = FolderSource.record

    def record(self, index):
        found = original(self, index)
        counts[found.name] += 1
        return found

    monkeypatch.setattr(FolderSource, "record", record)
    return counts


@pytest.mark.parametrize("name", ["prior", "clip", "dvae"])
def test_the_checks_list_a_folder_once(load, trained, listed, name):
    with pytest.raises(Trained):
        train_job.run(load(f"{name}.py:small"), "run")
    assert len(listed) == 1


@pytest.mark.parametrize("minutes", [None, 5.0])
def test_a_start_lists_a_folder_twice(load, listed, monkeypatch, minutes):
    """Once for the checks, and once for the training, whose data may have changed in the meantime."""

    def first(*_, **__):
        raise Trained

    monkeypatch.setattr(loop, "Run", first)
    monkeypatch.setattr(loop.budget, "measure", lambda *_: loop.budget.Costs(1.0, 1.0, 1.0, 1.0, 1.0))
    with pytest.raises(Trained):
        train_job.run(load("dvae.py:small", minutes=minutes), "run")
    assert len(listed) == 2


def test_an_image_is_looked_at_once(load, trained, read):
    """The contact sheet shows some of them again."""
    config = load("prior.py:small")
    with pytest.raises(Trained):
        train_job.run(config, "run")
    assert len(read) == 24 and sum(read.values()) <= 2 * 24


def test_equal_arguments_give_the_same_source(folder):
    options = DataOptions(source="folder", path=str(folder))
    with opened_once():
        with opened_once():
            source = opening.open_source(options, "train")
        assert opening.open_source(DataOptions(source="folder", path=str(folder), augment="dvae"), "train") is source
        assert opening.open_source(options, "validation") is not source
        other = DataOptions(source="folder", path=str(folder), caption_from="file_names")
        assert opening.open_source(other, "train") is not source
    assert opening.open_source(options, "train") is not source


def test_nothing_is_kept_after_an_error():
    made = iter(range(9))
    with pytest.raises(KeyError), opened_once():
        assert once("key", lambda: next(made)) == once("key", lambda: next(made)) == 0
        raise KeyError
    assert once("key", lambda: next(made)) == 1 and once("key", lambda: next(made)) == 2
