"""Every field of every options dataclass rejects other types, and numbers that are not finite or too large."""

import dataclasses
import inspect
import types
import typing

import pytest

from dalle_jax.aot.target import CompileOptions
from dalle_jax.configuration.options import defaults_of
from dalle_jax.configuration.size_rules import SizeRules
from dalle_jax.data.builders.emoji_captions.emoji_captions_dataset_builder import EmojiConfig
from dalle_jax.data.builders.shapes_captions.shapes_captions_dataset_builder import ShapesConfig
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation.by_class import ClassMetrics, ClassProtocol
from dalle_jax.evaluation.measure import Options
from dalle_jax.evaluation.test_sets import Protocol
from dalle_jax.image_tokenizers.discriminator import DiscriminatorOptions
from dalle_jax.image_tokenizers.dvae_network import DVAEOptions
from dalle_jax.image_tokenizers.vq_network import VQOptions
from dalle_jax.image_tokenizers.vqgan_options import VQGANOptions
from dalle_jax.models.beit import BEiTOptions
from dalle_jax.models.clip import CLIPOptions
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.optim import schedules
from dalle_jax.optim.optimizers import AverageOptions, OptimizerOptions
from dalle_jax.priors.autoregressive_model import AutoregressiveOptions
from dalle_jax.priors.lora import LoRAOptions
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.tasks.corrupted_negatives import NegativeOptions
from dalle_jax.tasks.dvae import ObjectiveOptions
from dalle_jax.tasks.vq import VQObjectiveOptions
from dalle_jax.tasks.vqgan_losses import VQGANObjectiveOptions

NAN, INFINITY = float("nan"), float("inf")
CLASSES = [
    AutoregressiveOptions, AverageOptions, BEiTOptions, CLIPOptions, ClassMetrics, ClassProtocol, CompileOptions,
    DVAEOptions, DataOptions, DiscriminatorOptions, LoRAOptions, MaskGITOptions,
    NegativeOptions, ObjectiveOptions, OptimizerOptions, Options, Protocol, SamplingOptions, SizeRules,
    TransformerOptions, VQGANObjectiveOptions, VQGANOptions, VQObjectiveOptions, VQOptions,
]  # fmt: skip
REQUIRED = {CompileOptions: {"target": "a.py", "topology": "v5e:2x2"}, Protocol: {"split": "validation"}}
# By type. No field has a use for any of them.
WRONG = {
    bool: ("yes", 1, 0.0, None, ()),
    int: (NAN, INFINITY, -INFINITY, "3", 2.5, True, (), 2**63, 10**400, -(2**63), b"3"),
    float: (NAN, INFINITY, -INFINITY, "3", True, (), 1e39, 10**400, 1j),
    str: (3, 2.5, True, (), b"x", NAN),
    tuple: (3, "x", (NAN,), (INFINITY,), ("x",), (-1.0,), (True,), (None,), [NAN], None),
}
FIELDS = [(cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls)]


def wrong_values(hint):
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if origin is types.UnionType:
        wrong = [value for one in arguments if one is not types.NoneType for value in wrong_values(one)]
        return [value for value in wrong if value is not None or types.NoneType not in arguments]
    if origin is tuple:
        return WRONG[tuple]
    if hint in WRONG:
        return [*WRONG[hint], None]
    return ["x", 3, NAN, (), None]  # a section


def make(cls, **values):
    """Creates options as a program without the type checker of the tests does (type_checks.py)."""
    made = object.__new__(cls)
    for name, value in {**defaults_of(cls), **REQUIRED.get(cls, {}), **values}.items():
        object.__setattr__(made, name, value)
    made.__post_init__()
    return made


@pytest.mark.parametrize("cls, name", FIELDS, ids=[f"{cls.__name__}.{name}" for cls, name in FIELDS])
def test_wrong_values(cls, name):
    hint = typing.get_type_hints(cls)[name]
    default = inspect.signature(cls).parameters[name].default
    tried = [value for value in wrong_values(hint) if not (value is None and default is None)]
    for value in tried:
        with pytest.raises(ConfigError, match=name):
            make(cls, **{name: value})
    assert len(tried) >= 4


@pytest.mark.parametrize("kind", schedules._KINDS)
def test_schedules(kind):
    fields = [field.name for field in dataclasses.fields(schedules._KINDS[kind])]
    right = dict.fromkeys(fields, 3)
    schedules.make({"kind": kind, **right})
    for name in fields:
        for value in (NAN, INFINITY, "3", True, (), None, 1e39, *([2.5, -1, 2**31] if "steps" in name else [])):
            with pytest.raises(ConfigError, match=f"schedules.lr.{name}"):
                schedules.make({"kind": kind, **right, name: value}, "lr")


@pytest.mark.parametrize("cls", [ShapesConfig, EmojiConfig])
@pytest.mark.parametrize("value", [NAN, "3", 2.5, True, 2**31, -1, None])
def test_builders(cls, value):
    for name in [field.name for field in dataclasses.fields(cls) if field.type == "int"]:
        if (name, value) == ("seed", 2**31):
            continue
        with pytest.raises(ConfigError, match=f"builder_kwargs.{name}"):
            make(cls, **{name: value})


@pytest.mark.parametrize(
    "cls, values",
    [
        (TransformerOptions, dict(depth=10**9)),
        (TransformerOptions, dict(dtype="int8")),
        (TransformerOptions, dict(mlp_ratio=1e9)),
        (AutoregressiveOptions, dict(anneal_end=2**32)),
        (CLIPOptions, dict(dtype="float99")),
        (DVAEOptions, dict(groups=10**9)),
        (VQOptions, dict(encoder_blocks=10**9)),
        (NegativeOptions, dict(spoiled=10**9)),
        (MaskGITOptions, dict(mask_schedule="powinf")),
        (SamplingOptions, dict(guidance=1e38)),
        (SamplingOptions, dict(temperature=-1e-9)),
        (OptimizerOptions, dict(eps=1e-50)),
        (OptimizerOptions, dict(scales={"encoder": NAN})),
        (OptimizerOptions, dict(scales={3: 1.0})),
        (DataOptions, dict(workers=10**9)),
        (Protocol, dict(seed=2**32)),
    ],
)
def test_sizes_that_no_machine_has(cls, values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        make(cls, **values)
