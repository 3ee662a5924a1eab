"""Arguments under the names that users of the library `diffusers` type.

Where the meaning is the same, the argument is understood. Otherwise the error names the argument to use instead.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dalle_jax.configuration.values import finite, shown
from dalle_jax.errors import ConfigError

# Their name: ours. Of several the method's own one is meant.
_OURS = {
    "prompt": ("captions", "caption"),
    "num_images_per_prompt": ("n",),
    "num_inference_steps": ("steps",),
    "guidance_scale": ("guidance",),
    "negative_prompt": ("negative",),
    "mask_image": ("mask",),
    "output_type": ("output",),
}
# Their name: what to do instead.
_INSTEAD = {
    "generator": "give seed, a whole number",
    "height": "the training fixed the size of the images (config.data.image_size)",
    "width": "the training fixed the size of the images (config.data.image_size)",
    "latents": "this model has none; give seed, a whole number",
    "eta": "give temperature or choice_temperature, the randomness of the sampler",
}


def in_our_names(given: Mapping[str, Any], parameters: Collection[str]) -> dict[str, Any]:
    """Returns keyword arguments under the names of a method.

    Args:
      given: keyword arguments.
      parameters: names of the method's parameters.

    Raises:
      ConfigError: an argument and its other name were given, or a value out of range.
    """
    found = {}
    for name, value in given.items():
        ours = next((one for one in _OURS.get(name, ()) if one in parameters and name not in parameters), name)
        if ours != name and ours in given:
            raise ConfigError(f"{name} is another name of {ours}: give one of them.")
        found[ours] = _value(name, value)
    return found


def instead_of(name: str) -> str:
    """Returns what to do instead of giving an argument, as a clause; "" if nothing is known."""
    return _INSTEAD.get(name, "")


def _value(name: str, value: Any) -> Any:
    """Returns a value as our argument means it."""
    if name == "guidance_scale":  # w in null + w·(conditional - null). Up to 1 it means no guidance.
        return max(finite(name, value, 0) - 1.0, 0.0)
    if name == "output_type":
        if value not in ("pil", "np"):
            raise ConfigError(f"output_type is {shown(value)}; expected 'pil' or 'np'.")
        return "numpy" if value == "np" else value
    return value
