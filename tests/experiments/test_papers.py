"""The tables "paper says / we have / why not" fit the configs, and notice a config that changes."""

import pathlib

import papers
import pytest
from paper_notes import NOTES
from paper_rows import Row

from dalle_jax.configuration import config_files

TABLES = papers.TABLES
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("target", TABLES)
def test_the_tables_fit_the_configs(target):
    assert papers.faults(TABLES[target], papers.load(target)) == []


def test_every_variant_named_after_a_paper_has_a_table():
    variants = {
        f"{name}.py:{variant}"
        for name in ("dvae", "prior", "maskgit", "clip", "beit")
        for variant in config_files.load_module(CONFIGS / f"{name}.py").VARIANTS
        if variant in ("paper", "vit_b32", "5.6b", "2.8b")
    }
    assert variants == set(TABLES) == set(NOTES)
    assert all(len(note) == 4 and note[1] != note[2] for notes in NOTES.values() for note in notes)


def test_the_written_tables_are_those_of_the_configs():
    """If this fails: python experiments/papers.py --output experiments/results/papers.md"""
    assert papers.WRITTEN.read_text() == papers.document()


@pytest.mark.parametrize(
    "target, key, value",
    [
        ("dvae.py:paper", "schedules.kl_weight.end", 5.0),
        ("dvae.py:paper", "data.augment", "prior"),
        ("maskgit.py:paper", "optimizer.clip_norm", 4.0),
        ("maskgit.py:paper", "model.steps", 18),
        ("maskgit.py:paper", "model.neighbour_kernel", 3),
        ("clip.py:vit_b32", "optimizer.decay", "kernels"),
        ("clip.py:vit_b32", "ema.decay", 0.99),
    ],
)
def test_a_changed_value_needs_a_reason(target, key, value):
    config = papers.load(target)
    config.update_from_flattened_dict({key: value})
    (fault,) = [fault for fault in papers.faults(TABLES[target], config) if "no reason" in fault]
    assert key.rpartition(".")[0] in fault


def test_keys_and_rows_without_each_other():
    rows, config = TABLES["dvae.py:paper"], papers.load("dvae.py:paper")
    (fault,) = papers.faults([row for row in rows if row.keys != "optimizer.weight_decay"], config)
    assert "optimizer.weight_decay" in fault
    (fault,) = papers.faults([*rows, Row("colour", "red", "model.colour")], config)
    assert "model.colour" in fault
    (fault,) = papers.faults([*rows, Row("batch", "512", "batch_size", "a reason against nothing")], config)
    assert "batch_size" in fault
