"""Batches for previews, and a data set that changed between a checkpoint and its reader."""

import numpy as np
import pytest
from memory_source import SIZE, MemorySource

from dalle_jax.data.pipeline import Pipeline
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.spread import evenly
from dalle_jax.errors import CheckpointError, DataChanged


def make(source=None, *, train=False, held_out=None, batch_size=8, rows=None, seed=0):
    options = DataOptions(image_size=SIZE)
    source = source or MemorySource()
    return Pipeline(
        options, split="x", train=train, batch_size=batch_size, seed=seed, rows=rows, source=source, held_out=held_out
    )


# -- spread -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 5, 63, 64, 1000])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_places_are_spread_evenly(length, count):
    places = evenly(length, count)
    assert len(places) == min(length, count) and places[0] == 0 and (count == 1 or places[-1] == length - 1)
    assert len(places) == 1 or np.ptp(np.diff(places)) <= 1 <= np.diff(places).min()


@pytest.mark.parametrize("count", [1, 2, 5, 8, 37])
def test_a_batch_spreads_over_the_split(count):
    batch = make(MemorySource(count)).spread_batch()
    shown = min(count, 8)
    assert batch["valid"].tolist() == [True] * shown + [False] * (8 - shown)
    assert batch["index"][:shown].tolist() == evenly(count, 8).tolist()
    np.testing.assert_array_equal(batch["image"][:shown, 0, 0, 0], batch["index"][:shown])


def test_hosts_together_create_the_batch():
    whole = make().spread_batch()
    parts = [make(rows=rows).spread_batch() for rows in (range(4), range(4, 8))]
    for name, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), value)


def test_unreadable_examples_are_counted_and_not_valid():
    pipeline = make(MemorySource(37, broken=[36]))
    batch = pipeline.spread_batch()
    assert batch["valid"].tolist() == [True] * 7 + [False]
    assert pipeline.skipped() == {"missing file": 1}


# -- changes ------------------------------------------------------------------------------------------------------


def source(count=37, identity=None):
    found = MemorySource(count)
    found.identity = identity
    return found


def state_of(*args, **options):
    with iter(make(*args, train=True, **options)) as iterator:
        next(iterator)
        return iterator.get_state()


def resume(state, *args, **options):
    with iter(make(*args, train=True, **options)) as iterator:
        iterator.set_state(state)
        assert b'"batches": 1' in iterator.get_state()


def test_added_examples_are_named():
    with pytest.raises(DataChanged, match=r"37.*40"):
        resume(state_of(source(37)), source(40))


@pytest.mark.parametrize("key, value", [("batch_size", 4), ("seed", 5)])
def test_a_changed_setting_names_its_key(key, value):
    with pytest.raises(CheckpointError, match=f"--config.{key}=") as raised:
        resume(state_of(), **{key: value})
    assert not isinstance(raised.value, DataChanged)


def test_edited_files_give_a_warning(caplog):
    """Equal files, and checkpoints of earlier versions, give none."""
    state = state_of(source(identity="a"))
    for reader in (source(identity="a"), source()):
        resume(state, reader)
    resume(state_of(source()), source(identity="b"))
    assert not caplog.records
    resume(state, source(identity="b"))
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "37" in caplog.text


@pytest.mark.parametrize(
    "before, now, token",
    [
        (source(5, "a"), source(6, "b"), "5 examples"),
        (source(5, "a"), source(5, "b"), "held-out files"),
        (source(5, "a"), source(5, "a"), None),
        (None, source(5, "a"), None),
    ],
)
def test_a_changed_held_out_split_gives_a_warning(caplog, before, now, token):
    resume(state_of(held_out=before), held_out=now)
    assert [token in record.message for record in caplog.records] == ([] if token is None else [True])
