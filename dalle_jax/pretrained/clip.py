"""Imports published CLIP weights from files of OpenAI, open_clip or Hugging Face.

    python -m dalle_jax.pretrained clip --weights=ViT-B-32.pt --vocabulary=bpe_simple_vocab_16e6.txt.gz \
        --output=runs/openai-clip

The output is a folder that `ClipScorer.load` reads. The weights may be safetensors, npz, or a file of `torch.save` or
`torch.jit.save`. `restricted_pickle` reads the latter without torch and without running their code. The vocabulary is a
file that the user provides, see `data.byte_pairs`. Only vision transformers are accepted as image towers.

| source            | names of arrays                                                                            |
|-------------------|--------------------------------------------------------------------------------------------|
| OpenAI, open_clip | `visual.conv1.weight`, `visual.transformer.resblocks.0.attn.in_proj_weight`,               |
|                   | `transformer.resblocks.0.mlp.c_fc.weight`, …                                               |
| Hugging Face      | `vision_model.encoder.layers.0.self_attn.q_proj.weight`, …                                 |

Matrices are [out, in], except for the two projections in the layout of OpenAI, which are [in, out].
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from dalle_jax.data.byte_pairs import BytePairs
from dalle_jax.errors import PretrainedError, UserError
from dalle_jax.models.clip import ACTIVATIONS, CLIP, CLIPOptions
from dalle_jax.pretrained import clip_settings, state_dict
from dalle_jax.pretrained.importer import Importer, Setting
from dalle_jax.pytree import PyTree
from dalle_jax.text_to_image.clip_scorer import ClipScorer

StateDict = Mapping[str, np.ndarray]

# Models that are no CLIP with a vision transformer, by the names of their arrays.
_OTHER_MODELS = {
    "logit_bias": "a SigLIP",
    "vision_model.head.": "a SigLIP",
    "visual.layer1.": "a CLIP whose image tower is a ResNet (RN50 and the like)",
    "visual.attnpool.": "a CLIP whose image tower is a ResNet (RN50 and the like)",
    "visual.trunk.": "a CLIP whose image tower is a model of timm",
    "visual.blocks.": "an EVA-CLIP",
    "visual.attn_pool.": "a CLIP with attentional pooling (CoCa)",
    "text_decoder.": "a CoCa",
    "text.transformer.": "a CLIP with a separate text tower of open_clip (CustomTextCLIP)",
    "text.": "a CLIP with a separate text tower of open_clip (CustomTextCLIP)",
    "text_model.": "a text tower alone, as in Stable Diffusion",
    "blocks.group_": "a dVAE of DALL-E",
    "Mixed_5b.": "an Inception-v3",
}
# Entries that are not parameters: settings in OpenAI's files, buffers in the others.
_NOT_PARAMETERS = re.compile(r"input_resolution|context_length|vocab_size|(.*\.)?(attn_mask|position_ids)")

# Hugging Face's names → OpenAI's, except for the three matrices of an attention layer.
_OPENAI_NAMES = (
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.weight", "visual.conv1.weight"),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"visual_projection\.weight", "visual.proj"),
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.final_layer_norm\.", "ln_final."),
    (r"text_projection\.weight", "text_projection"),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"(.*)\.self_attn\.out_proj\.", r"\1.attn.out_proj."),
    (r"(.*)\.layer_norm([12])\.", r"\1.ln_\2."),
    (r"(.*)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"(.*)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
)
# OpenAI's names → ours, inside a tower and inside one of its blocks.
_TOWER = {
    "visual.class_embedding": "image/class_token",
    "visual.positional_embedding": "image/positions",
    "visual.conv1.weight": "image/patch/kernel",
    "visual.ln_pre": "image/norm_before/norm",
    "visual.ln_post": "image/norm_after/norm",
    "visual.proj": "image/projection/kernel",
    "token_embedding.weight": "text/tokens",
    "positional_embedding": "text/positions",
    "ln_final": "text/norm_after/norm",
    "text_projection": "text/projection/kernel",
    "logit_scale": "logit_scale",
}
_BLOCK = {
    "ln_1": "attention_norm/norm",
    "ln_2": "mlp_norm/norm",
    "attn.in_proj": "qkv",
    "attn.out_proj": "out",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
}


def openai_names(arrays: StateDict) -> dict[str, np.ndarray]:
    """Renames arrays of any layout to OpenAI's names and drops entries that are not parameters.

    Args:
      arrays: arrays by name, as in the file.

    Raises:
      PretrainedError: an attention layer in Hugging Face's layout is incomplete.
    """
    plain = {name: array for name, array in arrays.items() if not _NOT_PARAMETERS.fullmatch(name)}
    if not any(name.startswith("vision_model.") for name in plain):
        return plain
    renamed = {}
    for name, array in plain.items():
        if found := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            layer, which, kind = found.groups()
            try:
                parts = [plain[f"{layer}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            except KeyError as error:
                raise PretrainedError(f"The weights have {name!r} but not {error}.") from error
            if which != "q":  # "q" has handled all three
                continue
            name, array = f"{layer}.attn.in_proj_{kind}", np.concatenate(parts)
        for pattern, words in _OPENAI_NAMES:
            name = re.sub(f"^{pattern}", words, name)
        renamed[name] = array.T if name in ("visual.proj", "text_projection") else array
    return renamed


def options_of(arrays: StateDict, activation: str, head_dims: tuple[int, int]) -> CLIPOptions:
    """Derives the sizes of the model from the shapes of its arrays.

    Args:
      arrays: arrays by OpenAI's names, as from `openai_names`.
      activation: "quick_gelu" or "gelu", which the arrays do not determine.
      head_dims: size of an attention head of the image and of the text tower, which the arrays do not determine.

    Raises:
      PretrainedError: the arrays are not those of such a model, or a width is not a multiple of its head's size.
    """
    for prefix, found in _OTHER_MODELS.items():
        if any(name.startswith(prefix) for name in arrays):
            raise PretrainedError(f"These are the weights of {found}. Give a CLIP whose image tower is a transformer.")
    for tower, size in zip(("image", "text"), head_dims, strict=True):
        if size < 1:
            raise PretrainedError(f"--{tower}_head_dim={size}; expected at least 1.")
    depths = [clip_settings.tower_depth(arrays, prefix) for prefix in ("visual.transformer", "transformer")]
    try:
        image_width, _, patch, _ = arrays["visual.conv1.weight"].shape
        places = len(arrays["visual.positional_embedding"]) - 1
        text_vocab, text_width = arrays["token_embedding.weight"].shape
        for tower, width, size in zip(("image", "text"), (image_width, text_width), head_dims, strict=True):
            if width % size:
                raise PretrainedError(f"--{tower}_head_dim={size} does not divide the width {width} of that tower.")
        hidden = len(arrays["visual.transformer.resblocks.0.mlp.c_fc.weight"])
        return CLIPOptions(
            image_size=round(places**0.5) * patch,
            patch=patch,
            image_width=image_width,
            image_depth=depths[0],
            image_heads=image_width // head_dims[0],
            image_mlp=None if hidden == 4 * image_width else hidden,
            text_width=text_width,
            text_depth=depths[1],
            text_heads=text_width // head_dims[1],
            embed_dim=arrays["text_projection"].shape[1],
            text_length=len(arrays["positional_embedding"]),
            text_vocab=text_vocab,
            end_id=text_vocab - 1,
            activation=activation,
        )
    except (KeyError, ValueError, IndexError, TypeError) as error:  # a ConfigError is a ValueError
        raise PretrainedError(
            f"These are not the weights of a CLIP with a vision transformer: {error} (expected 'visual.conv1.weight' "
            "or 'vision_model.embeddings.patch_embedding.weight', 'token_embedding.weight' and the like)."
        ) from error


def convert(arrays: StateDict, options: CLIPOptions) -> PyTree:
    """Renames, transposes and reshapes the original arrays.

    Args:
      arrays: arrays by OpenAI's names, as from `openai_names`.
      options: sizes, as from `options_of`.

    Returns:
      Parameters of `CLIP(options)`, float32 numpy arrays.

    Raises:
      PretrainedError: an array is missing, unexpected, has a shape that does not match the options, or is damaged.
    """
    converted = {}
    for name, array in arrays.items():
        path = _our_path(name)
        if path is None:
            raise PretrainedError(f"The weights have an unexpected array {name[:200]!r} of shape {array.shape}.")
        heads = options.image_heads if path[0] == "image" else options.text_heads
        converted[path] = np.asarray(_our_shape(path, state_dict.as_float32(name, array), heads))
    return state_dict.as_parameters(converted, CLIP(options).init, options)


def _our_path(name: str) -> tuple[str, ...] | None:
    """Returns the path in our tree of an array of the original, or None for an unknown name."""
    if name in _TOWER:
        return tuple(_TOWER[name].split("/"))
    block = re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
    inner, kind = (block[3], block[4]) if block else (name.rpartition(".")[0], name.rpartition(".")[2])
    place = (_BLOCK if block else _TOWER).get(inner)
    if place is None or kind not in ("weight", "bias"):
        return None
    leaf = "bias" if kind == "bias" else "scale" if place.endswith("norm") else "kernel"
    where = ("image" if block[1] else "text", f"block_{block[2]}") if block else ()
    return (*where, *place.split("/"), leaf)


def _our_shape(path: tuple[str, ...], array: np.ndarray, heads: int) -> np.ndarray:
    """Converts an array to our layout. An array of wrong size stays unchanged, so that `convert` can name it."""
    layer, leaf = path[-2:] if len(path) > 1 else ("", path[0])
    try:
        if layer == "patch":  # [D, 3, p, p]
            return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
        if leaf == "kernel" and layer != "projection":
            array = array.T
        if layer == "qkv":
            return array.reshape(*array.shape[:-1], 3, heads, -1)
        if layer == "out" and leaf == "kernel":
            return array.reshape(heads, -1, array.shape[-1])
    except ValueError:
        pass
    return array


def load(
    weights: str | os.PathLike,
    activation: str | None = None,
    image_head_dim: int | None = None,
    text_head_dim: int | None = None,
) -> tuple[CLIP, PyTree]:
    """Loads a CLIP model from a file of weights.

    Args:
      weights: the file, see `state_dict.read`.
      activation, image_head_dim, text_head_dim: see `options_of`. None reads them from `config.json` or
        `open_clip_config.json` next to the weights, else from a table of published sizes; see `clip_settings`.

    Returns:
      The model and its float32 parameters.

    Raises:
      PretrainedError: the file cannot be read, is not such a model, or nothing says what the arrays leave open.
    """
    stored = state_dict.read(weights)
    arrays = openai_names(stored)
    settings = {"activation": activation, "image_head_dim": image_head_dim, "text_head_dim": text_head_dim}
    if any(value is None for value in settings.values()):
        found = clip_settings.find(weights, stored, arrays)
        settings = {name: found.get(name) if value is None else value for name, value in settings.items()}
    if missing := [name for name, value in settings.items() if value is None]:
        flags_missing = ", ".join(f"--{name}=…" for name in missing)
        raise PretrainedError(
            f"{weights} does not say its {' and '.join(missing)}. Put its config.json or open_clip_config.json next to "
            f"it, or give {flags_missing} (open_clip's models without '-quickgelu' have the activation gelu)."
        )
    options = options_of(arrays, settings["activation"], (settings["image_head_dim"], settings["text_head_dim"]))
    return CLIP(options), jax.tree.map(jnp.asarray, convert(arrays, options))


def load_scorer(weights: str | os.PathLike, vocabulary: str | os.PathLike, *rest) -> ClipScorer:
    """Loads a CLIP model with its vocabulary as a scorer.

    Args:
      weights, *rest: see `load`.
      vocabulary: file or folder, see `BytePairs`.

    Raises:
      PretrainedError: see `load`, or the two files do not belong together.
      DataError: see `BytePairs`.
    """
    text_model = BytePairs(vocabulary)
    clip, params = load(weights, *rest)
    if text_model.end_id != clip.options.end_id:
        raise PretrainedError(
            f"{vocabulary} ends captions by id {text_model.end_id}, but the weights have {clip.options.text_vocab} "
            "tokens and end captions by the last one. Give the vocabulary of these weights."
        )
    return ClipScorer(clip, params, text_model)


def _run(files: Sequence[str | os.PathLike], output: str, settings: Mapping[str, Any]) -> str:
    """Imports a CLIP with its vocabulary; see `Importer.run`."""
    open_settings = [settings[name] for name in ("activation", "image_head_dim", "text_head_dim")]
    scorer = load_scorer(files[0], settings["vocabulary"], *open_settings)
    scorer.save(output)
    return str(scorer.clip.options)


IMPORTER = Importer(
    name="clip",
    title="CLIP with a vision transformer, of OpenAI, open_clip or Hugging Face",
    parameters=None,
    licence="MIT (OpenAI's)",
    source="github.com/openai/CLIP, github.com/mlfoundations/open_clip, huggingface.co/openai",
    files=("ViT-B-32.pt or another",),
    use="--config.clip",
    run=_run,
    claims=lambda arrays: {"visual.conv1.weight", "vision_model.embeddings.class_embedding"} & arrays.keys() != set(),
    settings=(
        Setting("vocabulary", str, "File or folder of the vocabulary (bpe_simple_vocab_16e6.txt.gz).", required=True),
        Setting("activation", str, "Default: as the files next to the weights say.", choices=tuple(ACTIVATIONS)),
        Setting("image_head_dim", int, "Size of an attention head of the image tower. Default: as published."),
        Setting("text_head_dim", int, "Size of an attention head of the text tower. Default: as published."),
    ),
)


def main(argv: list[str]) -> None:
    """Imports the files given by the flags: the command of earlier versions."""
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments {argv[1:]}.")
    values = flags.FLAGS
    try:
        settings = {setting.name: values[setting.name].value for setting in IMPORTER.settings}
        found = _run([values.weights], values.output, settings)
    except UserError as error:
        raise SystemExit(f"{error}") from error
    print(f"{values.output}: {found}")


if __name__ == "__main__":
    flags.DEFINE_string("weights", None, "File of the weights.", required=True)
    flags.DEFINE_string("output", None, "Folder to write the CLIP into.", required=True)
    for one in IMPORTER.settings:
        if one.choices:
            flags.DEFINE_enum(one.name, one.default, one.choices, one.help)
        elif one.kind is int:
            flags.DEFINE_integer(one.name, one.default, one.help)
        else:
            flags.DEFINE_string(one.name, one.default, one.help, required=one.required)
    app.run(main)
