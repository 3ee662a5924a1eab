"""Every config for pods compiles for its topologies and fits."""

import importlib.util
import json

import pods
import pytest

from dalle_jax.aot import topologies
from dalle_jax.models.transformer_options import REMAT

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
    assert not any(pod.overrides for pod in defaults.values())  # the unchanged config


@pytest.mark.pod
@pytest.mark.parametrize("pod", pods.PODS, ids=label)
def test_fits(pod):
    """Compiles with low effort. Full effort takes five times as long and needs up to an eighth more memory."""
    f = pods.costs_of(pod, "low")
    assert f["fits"] and f["bytes"]["total"] < f["bytes"]["memory"] * 7 / 8
    assert not f["unknown_loops"] and f["kernels_known"]
    assert f["chips"] == len(topologies.devices(pod.topology))
    if pod == pods.PODS[0]:
        assert f["utilisation"] > 0.5  # the 12-billion prior, by roofline, without overlapped exchanges
    if f["mesh"]["fsdp"] == 1:
        return
    # Parameters are gathered layer by layer inside the scan. Outside, only the token tables are gathered, for the
    # lookup and the heads. No part is sent around the ring.
    assert all("embedding" in name or "/head/" in name for name in f["gathers_outside_loops"])
    size = {kind: one["bytes"] for kind, one in f["collectives"].items()}
    assert size["collective-permute"] < 0.1 * size["all-gather"]
    parameters = 2 * f["parameters"]  # in bfloat16: gathered forward and backward, scattered once
    assert 1.5 * parameters < size["all-gather"] < 2.5 * parameters
    assert 0.8 * parameters < size["reduce-scatter"] + size["all-reduce"] < 1.5 * parameters


@pytest.mark.pod
def test_a_program_that_is_too_large_ends_with_remedies():
    keeps_all = pods.Pod("prior.py:paper", "v5e:16x16", "model.trunk.remat=dots")
    fewer = list(REMAT)[: list(REMAT).index("dots")]
    with pytest.raises(RuntimeError, match=f"remat={' or '.join(fewer)} .*accumulate_steps="):
        pods.costs_of(keeps_all, "low")


def test_the_table(tmp_path, monkeypatch):
    costs = {
        "chips": 4, "parameters": 1000, "rows": 8, "fits": True,
        "bytes": dict.fromkeys(("parameters", "average", "optimizer", "temporaries", "total", "memory"), 2**30),
        "flops": {"model": 1e12, "program": 2e12}, "utilisation": 0.5, "compile_seconds": 9.0,
        "seconds": {"step": 0.5, "kernels": 0.125, "exchange_exposed": 0.0625},
        "collectives": {"all-gather": {"bytes": 2**31, "overlapped": 0.5}}, "versions": {"jax": "0.1.2"},
        "effort": "low", "overrides": "mesh.data=2",
    }  # fmt: skip
    first = pods.PODS[0]
    monkeypatch.setattr(pods, "PODS", (first,))
    (tmp_path / f"{pods.name(first)}.json").write_text(json.dumps(costs))
    pods.write(tmp_path)
    for table in ((tmp_path / "compile.csv").read_text(), (tmp_path / "compile.md").read_text()):
        assert "50.0%" in table and "mesh.data=2" in table and "3.00" in table and "500" in table
