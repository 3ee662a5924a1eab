"""Sampling parameters: shown by name in signatures and documentation, and checked."""

import dataclasses
import inspect
import pathlib
import pydoc
import subprocess
import sys

import pytest

from dalle_jax import TextToImage
from dalle_jax.errors import ConfigError
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.text_to_image.sampling_parameters import parse

METHODS = (
    "generate",
    "best_of",
    "generate_one",
    "chunks",
    "complete",
    "inpaint",
    "vary",
    "outpaint",
    "draw_tokens",
    "upsample",
)
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


WRONG_TYPES = """
from dalle_jax.errors import ConfigError
from dalle_jax.text_to_image.sampling_parameters import parse

wrong = {
    "temperature": ("1", True, b"1", [1.0]), "final_temperature": ("1", True), "top_k": (2.5, 2.0, "3", True),
    "top_p": ("0.5", True), "guidance": ("1", None, True), "steps": (2.5, 8.0, "8", True), "order": (5, b"random"),
    "choice_temperature": ("1", True),
}
for name, values in wrong.items():
    for value in values:
        try:
            parse({name: value})
        except ConfigError as error:
            assert str(error).startswith(name), error
        else:
            raise AssertionError(f"{name}={value!r} was accepted")
print(parse({"steps": 8, "guidance": 1})[0].steps)
"""


def test_values_of_another_type_are_rejected():
    """In a process without the type checker of the tests, which would reject them earlier."""
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", WRONG_TYPES], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout == "8\n", done.stderr
