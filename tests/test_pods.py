"""Every config that is meant for pods, on the topologies that it names."""

import dataclasses
import importlib.util
import json

import pods
import pytest

from dalle_jax import compile as compile_module
from dalle_jax.compile import CompileOptions
from dalle_jax.tpu import figures, topologies

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed (pip install -e '.[tpu]')"
)


def label(pod):
    return f"{pod.target}-{pod.topology}"


def test_each_config_has_all_three_generations():
    generations = {}
    for pod in pods.PODS:
        generations.setdefault(pod.target, set()).add(pod.topology.partition(":")[0])
    assert set(map(frozenset, generations.values())) == {frozenset({"v5e", "v5p", "v6e"})}
    defaults = {pod.target: pod for pod in reversed(pods.PODS)}
    assert not any(pod.overrides for pod in defaults.values())  # the config as it stands


@pytest.mark.slow
@pytest.mark.parametrize("pod", pods.PODS, ids=label)
def test_meshes_batches_and_layouts(pod):
    """All but the compilation: widths divide, batches too, and the state leaves half of the memory free."""
    config = compile_module.load_target(f"configs/{pod.target}", pod.overrides)
    subject = compile_module.make_subject(config, topologies.devices(pod.topology))
    chip = topologies.chip(subject.mesh.devices.flat[0])
    assert subject.mesh.size == len(topologies.devices(pod.topology))
    assert figures.bytes_per_chip((subject.state, subject.frozen, subject.batch)) < chip.memory / 2


@pytest.mark.pod
@pytest.mark.parametrize("pod", pods.PODS, ids=label)
def test_fits(pod):
    f = compile_module.compile_target(CompileOptions(f"configs/{pod.target}", pod.topology, pod.overrides))
    assert f["fits"] and not f["unknown_loops"]
    assert f["bytes"]["total"] < f["bytes"]["memory"]


def test_the_table(tmp_path, monkeypatch):
    figures = {
        "chips": 4, "parameters": 1000, "rows": 8, "fits": True,
        "bytes": dict.fromkeys(("parameters", "average", "optimizer", "temporaries", "total", "memory"), 2**30),
        "flops": {"model": 1e12, "program": 2e12}, "seconds": {"step": 0.5, "compiler": 0.25}, "utilisation": 0.5,
        "collectives": {"all-gather": {"bytes": 2**31, "overlapped": 0.5}},
    }  # fmt: skip
    first = pods.PODS[0]
    monkeypatch.setattr(pods, "PODS", (dataclasses.replace(first, overrides="mesh.data=2"),))

    (tmp_path / f"{pods.name(first)}.json").write_text(json.dumps(figures))
    pods.write(tmp_path)
    for table in ((tmp_path / "compile.csv").read_text(), (tmp_path / "compile.md").read_text()):
        assert "50.0%" in table and "mesh.data=2" in table and "3.00" in table and "500.0" in table
