"""Annotations of models, priors and image tokenizers: they are complete, and the tests check them."""

import dataclasses
import importlib
import inspect
import pkgutil

import jax
import numpy as np
import pytest
import type_checks
from jaxtyping import TypeCheckError

from dalle_jax.priors.losses import cross_entropy

# Methods that Flax, dataclasses and protocols define, and the fields of options, which `config` checks.
_INHERITED = {"setup", "__init__", "__post_init__"}


def public_functions():
    """Returns the public functions and methods that the checked packages define, by qualified name."""
    found = {}
    for package in map(importlib.import_module, type_checks.PACKAGES):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for name, value in vars(module).items():
                if name.startswith("_") or getattr(value, "__module__", None) != info.name:
                    continue
                if inspect.isclass(value):
                    found |= {f"{info.name}.{name}.{m}": f for m, f in vars(value).items() if is_public_method(m, f)}
                elif callable(value):
                    found[f"{info.name}.{name}"] = inspect.unwrap(value)
    return found


def is_public_method(name, value):
    return inspect.isfunction(value) and (name == "__call__" or not name.startswith("_")) and name not in _INHERITED


def test_public_functions_are_annotated():
    functions = public_functions()
    assert len(functions) > 100
    for name, function in functions.items():
        if "flax" in (inspect.getsourcefile(inspect.unwrap(function)) or ""):
            continue
        signature = inspect.signature(inspect.unwrap(function))
        missing = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty
            and parameter.name != "self"
            and parameter.kind is not parameter.VAR_KEYWORD
        ]
        assert not missing, f"{name} lacks annotations of {missing}"
        assert signature.return_annotation is not signature.empty, f"{name} lacks the annotation of its result"


@pytest.mark.parametrize(
    "logits, targets",
    [
        (np.zeros((2, 3), np.float32), np.zeros(3, np.int32)),
        (np.zeros((2, 3), np.float32), np.zeros(2, np.float32)),
        (np.zeros((2, 3), np.int32), np.zeros(2, np.int32)),
    ],
)
def test_wrong_shapes_and_dtypes_are_found(logits, targets):
    with pytest.raises(TypeCheckError, match="targets|logits"):
        cross_entropy(logits, targets)
    jax.block_until_ready(cross_entropy(np.zeros((2, 3), np.float32), np.zeros(2, np.int32)))


def test_an_int_counts_as_a_float():
    options = importlib.import_module("dalle_jax.models.transformer").TransformerOptions
    assert dataclasses.replace(options(), mlp_ratio=2).hidden == 1024
