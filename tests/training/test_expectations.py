"""Tests of the advice at the start of a training: too long, too often, too large."""

import dataclasses
import types

import pytest
from tiny_job import tiny_config, tiny_job

from dalle_jax.configuration.config_files import load
from dalle_jax.training import expectations
from dalle_jax.training.expectations import free_bytes, seen_too_often, too_large, too_long
from dalle_jax.training.loop import train

GIB = 2**30


@pytest.mark.parametrize("file", ["dvae.py", "prior.py", "maskgit.py", "clip.py", "vqgan.py"])
def test_a_long_training_on_a_cpu(file):
    config = load(f"configs/{file}:shapes")
    assert too_long(config, 80_000.0) is None
    advice = too_long(config, 6172 * 3600.0)
    assert f"configs/{file}:small" in advice and "--config.minutes=" in advice and "257 days" in advice


def test_only_on_a_cpu(monkeypatch):
    monkeypatch.setattr(expectations.jax, "default_backend", lambda: "gpu")
    config = load("configs/prior.py:shapes")
    assert too_long(config, 1e9) is None
    assert too_large(config, update(100)) is None


def test_a_set_that_is_seen_too_often():
    config = load("configs/prior.py:shapes")  # 4,200 steps of 4
    assert seen_too_often(config, 24_576) is None and seen_too_often(config, 56) is None
    assert seen_too_often(config, 0) is None  # unknown
    advice = seen_too_often(config, 24)
    assert "700 times" in advice and "--config.steps=600" in advice


def update(gib):
    memory = types.SimpleNamespace(temp_size_in_bytes=gib * GIB - GIB, output_size_in_bytes=GIB)
    return types.SimpleNamespace(memory_analysis=lambda: memory)


def test_an_update_that_does_not_fit(monkeypatch):
    monkeypatch.setattr(expectations, "free_bytes", lambda: 23 * GIB)
    config = load("configs/prior.py:folder")
    assert too_large(config, update(20)) is None
    advice = too_large(config, update(22))
    assert "22.0 GiB" in advice and "23.0 GiB" in advice and "--config.batch_size" in advice
    monkeypatch.setattr(expectations, "free_bytes", lambda: None)  # not Linux
    assert too_large(config, update(1000)) is None


def test_free_memory(tmp_path):
    assert free_bytes(str(tmp_path)) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nMemAvailable:  700 kB\n")
    assert free_bytes(str(tmp_path)) == 700 * 1024
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.current").write_text("100000\n")
    (cgroup / "memory.max").write_text("max\n")
    assert free_bytes(str(tmp_path)) == 700 * 1024
    (cgroup / "memory.max").write_text("300000\n")
    assert free_bytes(str(tmp_path)) == 200_000


def test_a_training_says_it_before_its_first_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(expectations, "free_bytes", lambda: 100)
    config = tiny_config(steps=2, cadence__eval=1)
    train(config, str(tmp_path), dataclasses.replace(tiny_job(config), examples=1, held_out=1))
    assert "GiB" in capsys.readouterr().out.partition("eval ·")[0]


def test_labels_and_the_mesh(tmp_path, capsys, caplog):
    """Lines of training and evaluation differ, and one device needs no description."""
    caplog.set_level("INFO")
    config = tiny_config(steps=5)
    train(config, str(tmp_path / "one"), tiny_job(config))
    out = capsys.readouterr().out
    assert "eval · step 5/5" in out and "train · step 5/5" in out and "mesh" not in caplog.text
    config = tiny_config(steps=2, mesh__data=4, mesh__fsdp=2)
    train(config, str(tmp_path / "eight"), tiny_job(config))
    assert "mesh: 8 devices (cpu): data=4, fsdp=2, tensor=1" in caplog.text
