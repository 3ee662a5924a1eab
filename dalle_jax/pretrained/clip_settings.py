"""The settings of a published CLIP that its arrays do not determine: the activation and the sizes of attention heads.

| setting      | said by                                                                                              |
|--------------|------------------------------------------------------------------------------------------------------|
| both         | `config.json` (Hugging Face) or `open_clip_config.json` next to the weights                          |
| activation   | the entries `input_resolution` and `context_length`, which only OpenAI's files hold: quick_gelu       |
| head sizes   | else the table of the models that OpenAI and open_clip published, by width and depth of both towers   |

Nothing else is assumed. Sources that contradict each other are an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle_jax.errors import PretrainedError

# (width, depth) of the image tower and of the text tower → size of a head of each.
_PUBLISHED = {
    ((384, 12), (384, 12)): (64, 64),  # ViT-S/32, S/16
    ((384, 12), (256, 10)): (64, 64),  # ViT-S/32-alt, S/16-alt
    ((512, 12), (512, 12)): (64, 64),  # ViT-M/32, M/16
    ((512, 12), (384, 12)): (64, 64),  # ViT-M/32-alt
    ((768, 12), (512, 12)): (64, 64),  # ViT-B/32, B/16
    ((896, 12), (640, 12)): (64, 64),  # ViT-B/32-plus, B/16-plus
    ((1024, 24), (768, 12)): (64, 64),  # ViT-L/14, L/14@336, L/16
    ((1280, 32), (1024, 24)): (80, 64),  # ViT-H/14, H/16
    ((1408, 40), (1024, 24)): (88, 64),  # ViT-g/14
    ((1664, 48), (1280, 32)): (104, 64),  # ViT-bigG/14
    ((1792, 56), (1280, 36)): (112, 64),  # ViT-e/14
}
_ACTIVATIONS = ("quick_gelu", "gelu")
_OPENAI_ENTRIES = ("input_resolution", "context_length")
_LARGEST_CONFIG = 1 << 20  # bytes
_MAX_DEPTH = 1000
# Keys of open_clip's configurations that change nothing here, and the values of others that are like ours.
_WITHOUT_EFFECT = re.compile(
    r"image_size|layers|width|head_width|heads|patch_size|mlp_ratio|context_length|vocab_size|patch_dropout|"
    r"output_tokens|eos_id|hf_tokenizer_name|tokenizer_kwargs|(timm|hf|attn_pooler)_.*"
)
_LIKE_OURS = {"pool_type": ("tok", "argmax"), "pos_embed_type": ("learnable",), "proj_type": ("linear",)}
_OTHER_TOWERS = ("timm_model_name", "hf_model_name")


def tower_depth(names: Iterable[str], prefix: str) -> int:
    """Counts the blocks of a tower, "PREFIX.resblocks.0.…" to the last.

    Raises:
      PretrainedError: a block is missing in between, or there are more than 1000.
    """
    pattern = re.compile(rf"{re.escape(prefix)}\.resblocks\.(\d{{1,6}})\.")
    numbers = {int(found[1]) for name in names if (found := pattern.match(name))}
    depth = max(numbers, default=-1) + 1
    if len(numbers) != depth or depth > _MAX_DEPTH:
        raise PretrainedError(
            f"'{prefix}' has {len(numbers)} blocks, numbered up to {depth - 1}: blocks are missing, or are not CLIP's."
        )
    return depth


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
      PretrainedError: a configuration next to the weights is damaged, of another model than the weights, or of a model
        that computes something else than ours; or two sources contradict each other.
    """
    towers = {
        "image": (_width(arrays, "visual.conv1.weight", 0), tower_depth(arrays, "visual.transformer")),
        "text": (_width(arrays, "token_embedding.weight", 1), tower_depth(arrays, "transformer")),
    }
    found: dict[str, tuple[Any, str]] = {}

    def note(source: str, settings: Mapping[str, Any]) -> None:
        for name, value in settings.items():
            other, earlier = found.setdefault(name, (value, source))
            if other != value:
                raise PretrainedError(
                    f"{source} says {name}={value}, but {earlier} says {name}={other}. Give --{name}=…, or remove the "
                    "one that does not belong to these weights."
                )

    for name, read in (("config.json", _hugging_face), ("open_clip_config.json", _open_clip)):
        path = Path(weights).parent / name
        if path.is_file():
            note(str(path), _read(path, read, towers))
    if any(name in stored for name in _OPENAI_ENTRIES):
        note(f"{weights} (OpenAI's entry {_OPENAI_ENTRIES[0]})", {"activation": "quick_gelu"})
    settings = {name: value for name, (value, _) in found.items()}
    published = _PUBLISHED.get((towers["image"], towers["text"]))
    return {**(dict(zip(("image_head_dim", "text_head_dim"), published)) if published else {}), **settings}


def _width(arrays: Mapping[str, np.ndarray], name: str, axis: int) -> int:
    shape = np.shape(arrays.get(name, 0))
    return shape[axis] if len(shape) > axis else 0


def _read(path: Path, read: Any, towers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Reads a configuration next to the weights."""
    try:
        if path.stat().st_size > _LARGEST_CONFIG:
            raise ValueError(f"it has more than {_LARGEST_CONFIG:,} bytes")
        config = json.loads(path.read_bytes())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
        return read(config, towers)
    except (OSError, ValueError, RecursionError) as error:
        raise PretrainedError(
            f"{path}, next to the weights, is not a configuration of such a CLIP: {str(error)[:300]}. Move the weights "
            "into a folder without it, or download it again."
        ) from error


def _hugging_face(config: dict[str, Any], towers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Reads `config.json` of transformers; {} if it is not that of a model with two towers."""
    if not config.get("vision_config") or not config.get("text_config"):
        return {}
    if config.get("model_type", "clip") != "clip":
        raise ValueError(f"its model_type is {config['model_type']!r}, expected 'clip'")
    found, acts = {}, []
    for tower, key, width, heads in (("image", "vision_config", 768, 12), ("text", "text_config", 512, 8)):
        section, later = _section(config, key), _section(config, f"{key}_dict")  # the latter wins in transformers
        if clash := [name for name in later if name in section and later[name] != section[name]]:
            raise ValueError(f"{key} and {key}_dict differ in {clash[0]}")
        section = {**section, **later}
        size = _count(section, "hidden_size", width), _count(section, "num_hidden_layers", 12)
        found[f"{tower}_head_dim"] = _head_dim(tower, size, _count(section, "num_attention_heads", heads), towers)
        acts.append(section.get("hidden_act", "quick_gelu"))
        if section.get("layer_norm_eps", 1e-5) != 1e-5:
            raise ValueError(f"{key}.layer_norm_eps is {section['layer_norm_eps']}, expected 1e-5")
    if acts[0] != acts[1] or acts[0] not in _ACTIVATIONS:
        raise ValueError(f"hidden_act is {acts[0]} and {acts[1]}, expected {' or '.join(_ACTIVATIONS)} in both towers")
    return {**found, "activation": acts[0]}


def _open_clip(config: dict[str, Any], towers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Reads `open_clip_config.json`."""
    model = _section(config, "model_cfg") or config
    if not isinstance(model.get("vision_cfg"), dict) or not isinstance(model.get("text_cfg"), dict):
        raise ValueError("it has no vision_cfg and text_cfg")
    for key in ("custom_text", "multimodal_cfg", "init_logit_bias"):
        if model.get(key):
            raise ValueError(f"its {key} is set: the model is not a plain CLIP")
    found = {"activation": "quick_gelu" if _flag(model, "quick_gelu") else "gelu"}
    for tower, key, width, heads in (("image", "vision_cfg", 768, None), ("text", "text_cfg", 512, 8)):
        section = model[key]
        for name, value in section.items():
            like_ours = not value or value in _LIKE_OURS.get(name, ()) or _WITHOUT_EFFECT.fullmatch(name)
            if not like_ours or (value and name in _OTHER_TOWERS):
                raise ValueError(f"{key}.{name} is {value!r}, which this importer does not support")
        size = _count(section, "width", width), _count(section, "layers", 12)
        if heads is None:
            heads = size[0] // _count(section, "head_width", 64)
        found[f"{tower}_head_dim"] = _head_dim(tower, size, _count(section, "heads", heads), towers)
    return found


def _section(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Returns a section, {} if it is absent or null."""
    section = config.get(key) or {}
    if not isinstance(section, dict):
        raise ValueError(f"{key} is a {type(section).__name__}")
    return section


def _count(section: Mapping[str, Any], key: str, default: int) -> int:
    value = section.get(key, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {value!r}, expected a whole number from 1")
    return value


def _flag(section: Mapping[str, Any], key: str) -> bool:
    value = section.get(key, False)
    if type(value) is not bool:
        raise ValueError(f"{key} is {value!r}, expected true or false")
    return value


def _head_dim(tower: str, size: tuple[int, int], heads: int, towers: Mapping[str, tuple[int, int]]) -> int:
    """Returns the size of a head, after a comparison of a tower of the configuration with that of the weights."""
    if size != towers[tower]:
        raise ValueError(
            f"its {tower} tower has width {size[0]} and {size[1]} layers, but that of the weights {towers[tower][0]} "
            f"and {towers[tower][1]}"
        )
    if size[0] % heads:
        raise ValueError(f"its {tower} tower of width {size[0]} has {heads} heads")
    return size[0] // heads
