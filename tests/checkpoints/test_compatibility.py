"""Tests of the configuration keys that may change when a run resumes."""

import pathlib

import pytest
from tiny_job import tiny_config

from dalle_jax.checkpoints.compatibility import check_same_model, differences, to_json
from dalle_jax.configuration import config_files
from dalle_jax.errors import ConfigMismatch
from dalle_jax.tasks import registry

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def test_differences_of_configurations():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": None}
    assert differences(old, {"a": {"b": 2, "c": [1, 2]}, "e": 5}) == {"a.b": (1, 2), "e": (None, 5)}


def test_same_model():
    stored = to_json(tiny_config())
    check_same_model(stored, to_json(tiny_config(steps=99, batch_size=8, model__remat=True)), "x")
    with pytest.raises(ConfigMismatch, match="model.hidden.*text.length"):
        check_same_model(stored, to_json(tiny_config(model__hidden=32, text__length=5)), "x")
    with pytest.raises(ConfigMismatch, match="data.image_size"):
        check_same_model(stored, to_json(tiny_config(data__image_size=16)), "x")
    with pytest.raises(ConfigMismatch, match="ema.decay"):
        check_same_model(stored, to_json(tiny_config(ema__decay=0.0)), "x")
    check_same_model(stored, to_json(tiny_config(ema__decay=0.99)), "x")


def test_how_a_trunk_is_computed_may_change():
    """Also in a checkpoint from before the choice of attention kernels existed."""
    stored = {"model": {"trunk": {"width": 16, "remat": "none", "dtype": "float32"}}}
    how = {"remat": "full", "dtype": "bfloat16", "attention_kernel": "splash"}
    given = {"model": {"trunk": {"width": 16, **how, "float32_residual": True, "float32_logits": True}}}
    check_same_model(stored, given, "x")
    with pytest.raises(ConfigMismatch, match="model.trunk.width"):
        check_same_model(stored, {"model": {"trunk": given["model"]["trunk"] | {"width": 32}}}, "x")


@pytest.mark.parametrize(
    "name, key, other",
    [("prior", "order", "random"), ("prior", "start_tokens", True), ("clip", "image_readout", "patches")],
)
def test_a_key_newer_than_the_checkpoint_counts_as_its_default(name, key, other):
    given = to_json(config_files.load(f"{CONFIGS}/{name}.py:folder"))
    stored = to_json(given)
    del stored["model"][key], stored["optimizer"]["scales"]
    defaults = registry.defaults(given)
    check_same_model(stored, given, "x", defaults)
    check_same_model(given, stored, "x", defaults)
    with pytest.raises(ConfigMismatch, match=f"model.{key}.*{other}"):
        check_same_model(stored, given | {"model": given["model"] | {key: other}}, "x", defaults)
    with pytest.raises(ConfigMismatch, match=f"model.{key}"):
        check_same_model(stored, given, "x")
