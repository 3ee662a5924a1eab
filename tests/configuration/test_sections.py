"""Sections: every field of every options dataclass can be set by a flag; overrides; what shares a reference."""

import dataclasses
import pathlib
import typing

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from dalle_jax.aot.target import CompileOptions
from dalle_jax.configuration import config_files
from dalle_jax.configuration.sections import cadence, override, section, set_steps, training_loop
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation.by_class import ClassMetrics, ClassProtocol
from dalle_jax.evaluation.measure import Options
from dalle_jax.evaluation.test_sets import Protocol
from dalle_jax.priors.autoregressive import AutoregressiveOptions
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.tasks import registry

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# Fields that other keys determine, and so have no key themselves: by section, for each task or job.
DERIVED = {
    "dvae": {"model.image_size"},
    "vq": {"model.image_size"},
    "vqgan": {"model.image_size"},
    "prior": set(),
    "beit": set(),
    "clip": {"model.image_size", "model.text_length", "model.text_vocab", "model.end_id"},
    # Real images are used as they are, at the model's size.
    "evaluate": {"metrics.seed"}
    | {f"data.{key}" for key in ("image_size", "augment", "train_split", "eval_split", "condition")}
    | {f"data.{key}" for key in ("cache", "cache_bytes", "workers", "bpe_dropout")},
    "encode": {f"data.{key}" for key in ("augment", "cache", "cache_bytes", "bpe_dropout")},
    "data": {f"data.{key}" for key in ("augment", "cache", "cache_bytes", "workers", "bpe_dropout", "condition")},
}
# Values that differ from every default, as they stand on a command line, and as they arrive.
GIVEN = {int: ("7", 7), float: ("0.5", 0.5), str: ("word", "word"), bool: ("true", True), tuple: ("(3, 4)", (3, 4))}
MAPPING = ('{"name": 0.5}', {"name": 0.5})


def variants():
    for path in sorted(CONFIGS.glob("[!_]*.py")):
        names = getattr(config_files.load_module(path), "VARIANTS", {"": None})
        yield from (f"{path}:{name}".rstrip(":") for name in names)


def options_of(config):
    """The options dataclasses of a configuration's sections, and the fields that are derived; by dotted name."""
    inner = []
    if config.job == "train":
        found, derived = registry.options(config), DERIVED[config.task]
        inner = ["tokenizer"] if "tokenizer" in config else []
    elif config.job == "evaluate":
        found = {"": Protocol, "sampling": SamplingOptions, "metrics": Options}
        found |= {"data": DataOptions} if "data" in config else {}
        derived = DERIVED["evaluate"]
    elif config.job == "evaluate_classes":
        found, derived = {"": ClassProtocol, "sampling": SamplingOptions, "metrics": ClassMetrics}, set()
    elif config.job in ("data", "encode"):
        found, derived = {"data": DataOptions}, DERIVED[config.job]
    elif config.job == "quickstart":
        found, derived, inner = {"maskgit_sampling": SamplingOptions}, set(), ["prior", "maskgit", "clip", "evaluate"]
    else:
        found, derived = {"generate": {"sampling": SamplingOptions}, "compile": {"": CompileOptions}}[config.job], set()
    for name in inner:
        options, keys = options_of(config[name])
        found = found | {f"{name}.{key}".rstrip("."): cls for key, cls in options.items()}
        derived = derived | {f"{name}.{key}" for key in keys}
    return found, derived


def flag_values(hint):
    """(as on the command line, as in the configuration) for a field's type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in arguments:
        hint = next(one for one in arguments if one is not type(None))
    return GIVEN[tuple] if origin is tuple else GIVEN.get(hint, MAPPING)


def parsed(config, given):
    """Returns the configuration as the command line gives it, with the values of `given` by dotted key."""
    argv = ["main", f"--config={config}", *(f"--config.{key}={value}" for key, value in given.items())]
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv, lock_config=True)
    with config_files.importable(config):
        values(argv)
    return holder.value


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("config", [*variants()], ids=lambda config: pathlib.Path(config).name)
def test_every_field_of_every_options_dataclass_can_be_set(config):
    loaded = config_files.load(config)
    found, derived = options_of(loaded)
    assert found
    expected = {}
    for name, cls in found.items():
        for field, hint in typing.get_type_hints(cls).items():
            key = f"{name}.{field}".lstrip(".")
            if key not in derived and not dataclasses.is_dataclass(hint):
                expected[key] = flag_values(hint)
    arrived_config = parsed(config, {key: given for key, (given, _) in expected.items()})
    for key, (_, arrived) in expected.items():
        value = arrived_config
        for part in key.split("."):
            value = value[part]
        assert (value.to_dict() if isinstance(value, ConfigDict) else value) == arrived, key


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_a_mapping_can_be_set_key_by_key_or_whole():
    """A schedule of another kind has other numbers, so it is set whole."""
    constant = {"kind": "constant", "value": 0.5}
    given = {"optimizer.scales.encoder": 0.5, "schedules.kl_weight": constant, "schedules.learning_rate.end": 0.5}
    config = parsed(f"{CONFIGS}/dvae.py", given)
    assert config.optimizer.scales.to_dict() == {"encoder": 0.5}
    assert config.schedules.kl_weight.to_dict() == constant
    assert (config.schedules.learning_rate.end, config.schedules.learning_rate.kind) == (0.5, "warmup_cosine")


def test_a_section_holds_every_field_with_its_default():
    made = section(AutoregressiveOptions, trunk={"width": 16}, kernel=3)
    assert set(made) == {field.name for field in dataclasses.fields(AutoregressiveOptions)}
    assert (made.trunk.width, made.trunk.depth, made.kernel, made.order) == (16, 8, 3, "raster")
    made = section(AutoregressiveOptions, without=["kernel"])
    assert "kernel" not in made and "trunk" in made


def test_a_section_rejects_a_field_that_does_not_exist():
    with pytest.raises(ConfigError, match='kernal.*"kernel"'):
        section(AutoregressiveOptions, kernal=3)


def test_overrides():
    config = ConfigDict({"a": {"b": 1, "c": {"kind": "x", "value": 2}}, "cadence": dict.fromkeys(["eval"], 0)})
    config.cadence.update({"preview": 0, "checkpoint": 0})
    set_steps(config, 100)
    override(config, {"a.b": 3}, lambda steps: {"a.c": {"kind": "y"}, **cadence(steps // 4)})
    assert config.a.to_dict() == {"b": 3, "c": {"kind": "y"}}, "a dict replaces the section"
    config.steps = 40
    assert config.cadence.to_dict() == {"eval": 10, "preview": 10, "checkpoint": 10}, "they follow the steps"
    config.cadence.eval = 7
    assert config.cadence.preview == 10 and config.steps == 40, "each is set alone"
    with pytest.raises(ConfigError, match="a.d"):
        override(config, {"a.d": 3})


@pytest.mark.parametrize(
    "steps, every, log", [(1, 1, 1), (3, 1, 1), (100, 25, 5), (2000, 500, 50), (300_000, 5000, 50)]
)
def test_short_trainings_are_evaluated_four_times(steps, every, log):
    config = ConfigDict()
    set_steps(config, 1_000_000)
    training_loop(config, batch_size=8, every=5000)
    config.steps = steps  # by a flag
    assert config.cadence.to_dict() == {"log": log, **dict.fromkeys(("eval", "preview", "checkpoint"), every)}
