"""From sections to dataclasses, and the checks of sizes and choices."""

import dataclasses
from collections.abc import Mapping

import pytest
from ml_collections import ConfigDict

from dalle_jax.configuration.options import check, defaults_of, from_config
from dalle_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Inner:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = Inner()
    radii: tuple[float, ...] = (1.0,)
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)
    share: float | None = None


def test_from_config():
    section = {"name": "x", "inner": {"size": 4}, "radii": [1.0, 2.0], "scales": {"a": 0.5}}
    expected = Outer("x", Inner(4), (1.0, 2.0), {"a": 0.5})
    assert from_config(Outer, section, "outer") == from_config(Outer, ConfigDict(section), "outer") == expected
    assert from_config(Outer, {"name": "x", "scales": None}, "outer") == Outer("x"), "as older configurations have it"
    assert from_config(Outer, {"name": "x", "inner": Inner(5)}, "outer").inner.size == 5


@pytest.mark.parametrize(
    "section, where, words",
    [
        ({"name": "x", "shaer": 1}, "outer", 'config.outer .*shaer.*"share"'),
        ({"name": "x", "inner": {"sise": 1}}, "outer", "config.outer.inner .*sise"),
        ({"name": "x", "inner": {"sise": 1}}, "", "config.inner .*sise"),
        ({}, "outer", "config.outer .*name"),
        ({"nam": "x"}, "", "config .*nam"),
    ],
)
def test_keys_that_do_not_fit(section, where, words):
    with pytest.raises(ConfigError, match=words):
        from_config(Outer, section, where)


def test_the_document_is_named():
    with pytest.raises(ConfigError, match="options.json.inner .*sise"):
        from_config(Outer, {"name": "x", "inner": {"sise": 1}}, "", "options.json")


def test_defaults():
    assert defaults_of(Outer) == {"inner": Inner(), "radii": (1.0,), "scales": {}, "share": None}


@dataclasses.dataclass(frozen=True)
class Sizes:
    width: int = 1
    ratio: float = 1.0
    count: int = 0
    dropout: float | None = None
    kernel: int = 3
    norm: str = "a"

    def __post_init__(self):
        check(
            self,
            "model",
            positive=("width", "ratio"),
            at_least_0=("count",),
            share=("dropout",),
            odd=("kernel",),
            choices={"norm": ("a", "b")},
        )


@pytest.mark.parametrize(
    "name, wrong, right",
    [
        ("width", (0, -1), 1), ("ratio", (0.0, float("nan")), 0.1), ("count", (-1,), 0), ("kernel", (2,), 1),
        ("dropout", (-0.1, 1.1, float("nan")), 1.0), ("norm", ("c", ""), "b"),
    ],
)  # fmt: skip
def test_checks(name, wrong, right):
    assert getattr(Sizes(**{name: right}), name) == right
    for value in wrong:
        with pytest.raises(ConfigError, match=f"config.model.{name} is {value!r}"):
            Sizes(**{name: value})
