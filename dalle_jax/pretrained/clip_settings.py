"""The settings of a published CLIP that its arrays do not determine: the activation and the sizes of attention heads.

They come from the first of these that says them:

1. `config.json` (Hugging Face) or `open_clip_config.json` next to the weights.
2. For the activation: the entries `input_resolution` and `context_length` that only OpenAI's files hold. OpenAI's
   models use quick_gelu.
3. For the sizes of heads: the widths of the models that OpenAI and open_clip published.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax.errors import PretrainedError

# Width of the image tower → size of a head: S to L, H, g, bigG and e of open_clip's model configurations.
_IMAGE_HEAD_DIMS = {384: 64, 512: 64, 768: 64, 896: 64, 1024: 64, 1280: 80, 1408: 88, 1664: 104, 1792: 112}
_TEXT_HEAD_DIMS = dict.fromkeys((256, 384, 512, 640, 768, 1024, 1280), 64)
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_new": None, "gelu_pytorch_tanh": None}
_OPENAI_ENTRIES = ("input_resolution", "context_length")


def find(
    weights: str | os.PathLike, stored: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Finds the settings of a file of weights.

    Args:
      weights: the file. Its folder may hold a configuration.
      stored: its arrays by the names in the file.
      arrays: the same by OpenAI's names.

    Returns:
      Those of "activation", "image_head_dim" and "text_head_dim" that something says.

    Raises:
      PretrainedError: a configuration next to the weights is damaged, or names an activation that no CLIP here has.
    """
    found: dict[str, Any] = {}
    if any(name in stored for name in _OPENAI_ENTRIES):
        found["activation"] = "quick_gelu"
    image_width, text_width = _width(arrays, "visual.conv1.weight", 0), _width(arrays, "token_embedding.weight", 1)
    found["image_head_dim"] = _IMAGE_HEAD_DIMS.get(image_width)
    found["text_head_dim"] = _TEXT_HEAD_DIMS.get(text_width)
    for name, read in (("config.json", _hugging_face), ("open_clip_config.json", _open_clip)):
        path = Path(weights).parent / name
        if path.is_file():
            try:
                found |= read(json.loads(path.read_text()))
            except (ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError, RecursionError) as error:
                raise PretrainedError(
                    f"{path}, next to the weights, is not a configuration of CLIP ({type(error).__name__}: {error}). "
                    "Move the weights into a folder without it, or download it again."
                ) from error
    return {name: value for name, value in found.items() if value is not None}


def _width(arrays: Mapping[str, np.ndarray], name: str, axis: int) -> int:
    shape = np.shape(arrays.get(name, 0))
    return shape[axis] if len(shape) > axis else 0


def _hugging_face(config: dict[str, Any]) -> dict[str, Any]:
    image, text = config.get("vision_config"), config.get("text_config")
    if not image or not text:
        return {}
    found = {}
    for tower, section, width, heads in (("image", image, 768, 12), ("text", text, 512, 8)):
        width, heads = section.get("hidden_size", width), section.get("num_attention_heads", heads)
        found[f"{tower}_head_dim"] = width // heads
    names = {section.get("hidden_act", "quick_gelu") for section in (image, text)}
    if len(names) != 1 or _ACTIVATIONS.get(*names) is None:
        raise ValueError(f"hidden_act is {' and '.join(sorted(names))}, expected quick_gelu or gelu in both towers")
    return {**found, "activation": names.pop()}


def _open_clip(config: dict[str, Any]) -> dict[str, Any]:
    model = config.get("model_cfg", config)
    image, text = model["vision_cfg"], model["text_cfg"]
    return {
        "activation": "quick_gelu" if model.get("quick_gelu", False) else "gelu",
        "image_head_dim": image.get("head_width", 64),
        "text_head_dim": text["width"] // text["heads"] if "heads" in text else None,
    }
