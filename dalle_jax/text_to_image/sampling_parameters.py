"""The sampling parameters of the public methods: checks them, and shows them by name in `help`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from dalle_jax.configuration.options import closest
from dalle_jax.configuration.values import shown
from dalle_jax.errors import ConfigError
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.text_to_image.other_names import in_our_names, instead_of

F = TypeVar("F", bound=Callable[..., Any])

_PLACE = "  **sampling: the sampling parameters."
_NEGATIVE = "  negative: a caption that guidance leads away from, or None for the empty caption. Needs guidance > 0."


def parse(sampling: Mapping[str, Any]) -> tuple[SamplingOptions, str | None]:
    """Checks the sampling parameters of a call.

    Args:
      sampling: fields of `SamplingOptions` and `negative`, by name.

    Returns:
      The sampling options, and the negative caption or None.

    Raises:
      ConfigError: an unknown name, a value out of range, or a negative caption without guidance.
    """
    known = {field.name for field in dataclasses.fields(SamplingOptions)} | {"negative"}
    if unknown := sorted(set(sampling) - known):
        remedy = instead_of(unknown[0]) or f"expected some of {', '.join(sorted(known))}"
        raise ConfigError(f"There is no sampling parameter {unknown[0]!r}{closest(unknown[0], known)}; {remedy}.")
    fields = dict(sampling)
    negative = fields.pop("negative", None)
    options = SamplingOptions(**fields)
    if negative is not None and not options.guidance:
        raise ConfigError(
            f"The negative caption {shown(negative)} has no effect because guidance is 0: set guidance above 0 "
            "(--config.sampling.guidance), or leave negative out."
        )
    return options, negative


def by_name(method: F) -> F:
    """Shows the sampling parameters by name in a method's signature and documentation.

    `help`, notebooks and shells then list them. The method receives them as `**sampling`. Names, defaults and texts
    come from `SamplingOptions`, so that they are written once. The names of `other_names` are understood too.

    Args:
      method: a method with `**sampling`, whose docstring has one line for it in `Args`.
    """
    signature = inspect.signature(method)
    others = [parameter for parameter in signature.parameters.values() if parameter.name != "sampling"]
    keyword = inspect.Parameter.KEYWORD_ONLY
    shown = [
        inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
        for field in dataclasses.fields(SamplingOptions)
    ]
    shown.append(inspect.Parameter("negative", keyword, default=None, annotation="str | None"))
    names = {parameter.name for parameter in (*others, *shown)}

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **in_our_names(kwargs, names))

    call.__signature__ = signature.replace(parameters=[*others, *shown])
    if method.__doc__:  # python -OO removes docstrings
        attributes = inspect.getdoc(SamplingOptions).partition("Attributes:\n")[2].rstrip()
        call.__doc__ = inspect.getdoc(method).replace(_PLACE, f"{attributes}\n{_NEGATIVE}")
    return call
