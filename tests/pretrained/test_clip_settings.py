"""Settings that the arrays of a CLIP leave open are read, looked up or asked for, and never guessed."""

import json
import pathlib

import numpy as np
import pytest
from torchvision_on_cpu import import_torchvision

from dalle_jax.errors import PretrainedError
from dalle_jax.pretrained import clip_settings


def shapes_of(image=(64, 3), text=(48, 2)):
    """Returns arrays from which only the width and the depth of both towers can be read."""
    blocks = [f"visual.transformer.resblocks.{i}.ln_1.weight" for i in range(image[1])]
    blocks += [f"transformer.resblocks.{i}.ln_1.weight" for i in range(text[1])]
    return {
        "visual.conv1.weight": np.zeros((image[0], 3, 14, 14), np.float16),
        "token_embedding.weight": np.zeros((10, text[0]), np.float16),
        **dict.fromkeys(blocks, np.zeros(1)),
    }


@pytest.mark.parametrize(
    ("name", "image", "text", "heads"),
    [
        ("ViT-B/32, B/16", (768, 12), (512, 12), (12, 8)),
        ("ViT-L/14, L/14@336", (1024, 24), (768, 12), (16, 12)),
        ("ViT-H/14", (1280, 32), (1024, 24), (16, 16)),
        ("ViT-g/14", (1408, 40), (1024, 24), (16, 16)),
        ("ViT-bigG/14", (1664, 48), (1280, 32), (16, 20)),
    ],
)
def test_published_sizes_have_their_number_of_heads(tmp_path, name, image, text, heads):
    arrays = shapes_of(image, text)
    found = clip_settings.find(tmp_path / "weights", arrays, arrays)
    assert (image[0] // found["image_head_dim"], text[0] // found["text_head_dim"]) == heads, name
    assert "activation" not in found, "nothing says it"


def test_every_plain_model_of_open_clip_is_in_the_table():
    import_torchvision()
    open_clip = pytest.importorskip("open_clip", reason="needs open_clip_torch==3.3.0")
    checked = 0
    for path in (pathlib.Path(open_clip.__file__).parent / "model_configs").glob("ViT-*.json"):
        config = json.loads(path.read_text())
        image, text = config["vision_cfg"], config["text_cfg"]
        plain = set(image) <= {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
        if plain and not {"hf_tokenizer_name", "hf_model_name"} & set(text):
            found = clip_settings._PUBLISHED[(image["width"], image["layers"]), (text["width"], text["layers"])]
            assert found == (image.get("head_width", 64), text["width"] // text["heads"]), path.name
            checked += 1
    assert checked > 20


@pytest.mark.parametrize(("image", "text"), [((1024, 23), (768, 12)), ((768, 12), (768, 12)), ((512, 4), (512, 4))])
def test_sizes_that_nobody_published_are_not_guessed(tmp_path, image, text):
    arrays = shapes_of(image, text)
    assert clip_settings.find(tmp_path / "weights", arrays, arrays) == {}


def test_files_of_openai_have_quick_gelu(tmp_path):
    arrays = shapes_of((768, 12), (512, 12))
    found = clip_settings.find(tmp_path / "weights", {**arrays, "input_resolution": np.array(224)}, arrays)
    assert found["activation"] == "quick_gelu"


HUGGING_FACE = {
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "hidden_act": "gelu"},
    "text_config": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "hidden_act": "gelu"},
}
MODEL = {
    "vision_cfg": {"width": 64, "layers": 3, "head_width": 16, "patch_size": 14, "image_size": 28},
    "text_cfg": {"width": 48, "layers": 2, "heads": 3, "context_length": 9, "vocab_size": 50},
}


def found_next_to(folder, **configs):
    arrays = shapes_of()
    for name, content in configs.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_bytes(text.encode("latin-1"))
    return clip_settings.find(folder / "weights", arrays, arrays)


def changed(config, section, **values):
    return {**config, section: {**config[section], **values}}


def test_a_configuration_next_to_the_weights_is_used(tmp_path):
    expected = {"activation": "gelu", "image_head_dim": 16, "text_head_dim": 16}
    assert found_next_to(tmp_path, config=HUGGING_FACE) == expected
    assert found_next_to(tmp_path, config={**HUGGING_FACE, "text_config_dict": {"hidden_act": "gelu"}}) == expected
    assert found_next_to(tmp_path, open_clip_config={"model_cfg": MODEL, "preprocess_cfg": {}}) == expected
    (tmp_path / "config.json").unlink()
    found = found_next_to(tmp_path, open_clip_config={"model_cfg": {**MODEL, "quick_gelu": True}})
    assert found == {**expected, "activation": "quick_gelu"}
    found = found_next_to(tmp_path, open_clip_config=changed(MODEL, "vision_cfg", head_width=32))
    assert found == {**expected, "image_head_dim": 32}
    assert found_next_to(tmp_path, config={"a": 1}) == found, "a config.json of something else says nothing"


def test_configurations_that_contradict_each_other_are_rejected(tmp_path):
    with pytest.raises(PretrainedError, match=r"open_clip_config\.json says activation=quick_gelu.*--activation"):
        found_next_to(tmp_path, config=HUGGING_FACE, open_clip_config={**MODEL, "quick_gelu": True})
    arrays = shapes_of()
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(PretrainedError, match="input_resolution"):
        clip_settings.find(tmp_path / "weights", {**arrays, "input_resolution": np.array(28)}, arrays)


@pytest.mark.parametrize(
    ("name", "content", "token"),
    [
        ("config", "[]", "list"), ("config", "{", "config"), ("config", "null", "NoneType"), ("config", "7", "int"),
        ("config", "[" * 100_000, "config"), ("config", "\xff" * 9, "config"), ("config", " " * (2 << 20), "bytes"),
        ("config", changed(HUGGING_FACE, "text_config", hidden_act="relu"), "relu"),
        ("config", changed(HUGGING_FACE, "text_config", hidden_act="quick_gelu"), "quick_gelu"),
        ("config", changed(HUGGING_FACE, "text_config", hidden_act=["gelu"]), "hidden_act"),
        ("config", changed(HUGGING_FACE, "text_config", hidden_size="48"), "hidden_size"),
        ("config", changed(HUGGING_FACE, "vision_config", num_attention_heads=0), "num_attention_heads"),
        ("config", changed(HUGGING_FACE, "vision_config", num_attention_heads=-4), "num_attention_heads"),
        ("config", changed(HUGGING_FACE, "vision_config", num_attention_heads=5), "5 heads"),
        ("config", changed(HUGGING_FACE, "vision_config", num_attention_heads=True), "num_attention_heads"),
        ("config", changed(HUGGING_FACE, "vision_config", hidden_size=128), "128"),
        ("config", changed(HUGGING_FACE, "vision_config", num_hidden_layers=4), "4"),
        ("config", changed(HUGGING_FACE, "vision_config", layer_norm_eps=1e-6), "layer_norm_eps"),
        ("config", {**HUGGING_FACE, "vision_config": [1]}, "vision_config"),
        ("config", {**HUGGING_FACE, "model_type": "siglip"}, "siglip"),
        ("config", {**HUGGING_FACE, "vision_config_dict": {"hidden_act": "quick_gelu"}}, "vision_config_dict"),
        ("open_clip_config", {}, "vision_cfg"), ("open_clip_config", {"model_cfg": [1]}, "model_cfg"),
        ("open_clip_config", {**MODEL, "quick_gelu": "yes"}, "quick_gelu"),
        ("open_clip_config", {**MODEL, "custom_text": True}, "custom_text"),
        ("open_clip_config", {**MODEL, "multimodal_cfg": {"width": 8}}, "multimodal_cfg"),
        ("open_clip_config", changed(MODEL, "vision_cfg", head_width=0), "head_width"),
        ("open_clip_config", changed(MODEL, "vision_cfg", head_width=128), "heads"),
        ("open_clip_config", changed(MODEL, "vision_cfg", layers=[3, 4, 6, 3]), "layers"),
        ("open_clip_config", changed(MODEL, "vision_cfg", pool_type="avg"), "pool_type"),
        ("open_clip_config", changed(MODEL, "vision_cfg", act_kwargs={"approximate": "tanh"}), "act_kwargs"),
        ("open_clip_config", changed(MODEL, "vision_cfg", timm_model_name="convnext"), "timm_model_name"),
        ("open_clip_config", changed(MODEL, "text_cfg", no_causal_mask=True), "no_causal_mask"),
        ("open_clip_config", changed(MODEL, "text_cfg", hf_model_name="bert"), "hf_model_name"),
    ],
    ids=lambda value: str(value)[:25],
)  # fmt: skip
def test_configurations_of_other_models_are_rejected(tmp_path, name, content, token):
    with pytest.raises(PretrainedError, match=rf"{name}\.json.*{token}") as raised:
        found_next_to(tmp_path, **{name: content})
    assert len(str(raised.value)) < 1000


def test_blocks_are_counted():
    assert clip_settings.tower_depth(shapes_of(), "visual.transformer") == 3
    assert clip_settings.tower_depth(shapes_of(), "transformer") == 2
    with pytest.raises(PretrainedError, match="1001"):
        clip_settings.tower_depth(shapes_of(text=(48, 1001)), "transformer")
