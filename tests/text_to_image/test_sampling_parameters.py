"""Sampling parameters: shown by name in signatures and documentation, and checked."""

import dataclasses
import inspect
import pydoc

import pytest

from dalle_jax import TextToImage
from dalle_jax.errors import ConfigError
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.text_to_image.sampling_parameters import parse

METHODS = ("generate", "best_of", "generate_one", "chunks", "complete", "inpaint", "vary", "outpaint", "draw_tokens")
NAMES = [field.name for field in dataclasses.fields(SamplingOptions)] + ["negative"]


@pytest.mark.parametrize("name", METHODS)
def test_signature_and_documentation_list_every_parameter(name):
    method = getattr(TextToImage, name)
    parameters = inspect.signature(method).parameters
    assert "sampling" not in parameters and not {p.kind for p in parameters.values()} & {inspect.Parameter.VAR_KEYWORD}
    defaults = {**{field.name: field.default for field in dataclasses.fields(SamplingOptions)}, "negative": None}
    assert {parameter: parameters[parameter].default for parameter in NAMES} == defaults
    arguments = method.__doc__.partition("Args:\n")[2].partition("\n\n")[0].splitlines()
    documented = [line.strip().split(":")[0] for line in arguments if line.startswith("  ") and line[2] != " "]
    given = [parameter for parameter in parameters if parameter != "self"]
    assert documented == given, "Args has every parameter once, in order"


def test_help_shows_the_parameters_by_name():
    text = pydoc.render_doc(TextToImage, renderer=pydoc.plaintext)
    assert "**" not in text and text.count("temperature: 'float' = 1.0") == len(METHODS)


def test_parse():
    assert parse({}) == (SamplingOptions(), None)
    options, negative = parse({"top_k": 3, "guidance": 1.0, "negative": "a star"})
    assert options == SamplingOptions(top_k=3, guidance=1.0) and negative == "a star"
    with pytest.raises(ConfigError, match="heat"):
        parse({"heat": 1})
    with pytest.raises(ConfigError, match="top_k"):
        parse({"top_k": 0})
    with pytest.raises(ConfigError, match="guidance"):
        parse({"negative": "a star"})
