"""Our CLIP equals those of open_clip and Hugging Face, and every file format gives the same parameters."""

import dataclasses
import functools
import importlib.util
import json

import jax
import numpy as np
import pytest
from processes import finish, spawn
from torchvision_on_cpu import import_torchvision

from dalle_jax.errors import PretrainedError
from dalle_jax.models.clip import CLIP, CLIPOptions, preprocess
from dalle_jax.pretrained import clip as importer
from dalle_jax.pretrained import state_dict
from dalle_jax.text_to_image.clip_scorer import ClipScorer

SMALL = CLIPOptions(
    image_size=32, patch=8, image_width=64, image_depth=3, image_heads=4, text_width=48, text_depth=2, text_heads=3,
    embed_dim=24, text_length=9, text_vocab=50, end_id=49,
)  # fmt: skip

OPTIONS = "quick_gelu", (16, 16)
SETTINGS = "quick_gelu", 16, 16  # the activation, and the sizes of attention heads


def inputs(options, rows=3):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (rows, options.image_size, options.image_size, 3), np.uint8)
    text = rng.integers(0, options.end_id, (rows, options.text_length), np.int32)
    text[:, 0] = options.end_id - 1
    for row, end in zip(text, (options.text_length - 1, 4, 2)):
        row[end] = options.end_id
        row[end + 1 :] = 0
    return images, text


def shake(model, seed=0):
    """Adds random values to norms and biases, so that every parameter affects the outputs."""
    import torch

    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and name != "logit_scale":
            parameter.data += torch.randn_like(parameter) * 0.1
    return model.eval()


@functools.partial(jax.jit, static_argnums=0)
def encode(clip, params, images, text):
    return clip.encode_image(params, images), clip.encode_text(params, text)


def differences(theirs, arrays, options, head_dim):
    """Returns the largest absolute differences of the embeddings of images and of captions.

    Args:
      theirs: maps (images [B, 3, H, W], text) to unit vectors.
      arrays: their state dict, which ours is converted from.
      options: the options that the conversion must find.
      head_dim: size of an attention head.
    """
    import torch

    images, text = inputs(options)
    with torch.no_grad():
        pixels = torch.tensor(np.asarray(preprocess(images, options.image_size))).permute(0, 3, 1, 2)
        expected = [x.numpy() for x in theirs(pixels, torch.tensor(text, dtype=torch.long))]
    for vectors in expected:  # of length one, and different for each row
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
        assert all(np.abs(vectors[i] - vectors[j]).max() > 1e-2 for i, j in ((0, 1), (0, 2), (1, 2)))
    arrays = importer.openai_names(arrays)
    assert importer.options_of(arrays, options.activation, (head_dim, head_dim)) == options
    ours = encode(CLIP(options), importer.convert(arrays, options), images, text)
    return [float(np.abs(one - other).max()) for one, other in zip(ours, expected)]


def state(model):
    return {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}


# -- open_clip ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def open_clip():
    import_torchvision()
    return pytest.importorskip("open_clip", reason="needs open_clip_torch==3.3.0")


def open_clip_model(open_clip, options):
    vision = open_clip.CLIPVisionCfg(
        layers=options.image_depth, width=options.image_width, head_width=options.image_width // options.image_heads,
        patch_size=options.patch, image_size=options.image_size,
        mlp_ratio=(options.image_mlp or 4 * options.image_width) / options.image_width + 1e-9,
    )  # fmt: skip
    text = open_clip.CLIPTextCfg(
        context_length=options.text_length, vocab_size=options.text_vocab, width=options.text_width,
        heads=options.text_heads, layers=options.text_depth,
    )  # fmt: skip
    return shake(open_clip.model.CLIP(options.embed_dim, vision, text, quick_gelu=options.activation == "quick_gelu"))


def open_clip_differences(model, options, head_dim):
    run = lambda pixels, text: (model.encode_image(pixels, normalize=True), model.encode_text(text, normalize=True))
    return differences(run, state(model), options, head_dim)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_same_vectors_as_open_clip(open_clip, activation):
    depths = {} if activation == "quick_gelu" else {"image_depth": 1, "text_depth": 1}
    options = dataclasses.replace(SMALL, activation=activation, **depths)
    assert max(open_clip_differences(open_clip_model(open_clip, options), options, 16)) < 1e-4


def test_models_like_laions_are_imported_without_flags(open_clip, tmp_path):
    """ViT-H/14 and ViT-g/14 made small: image heads of 80 and 88, the exact GELU, in g a wider MLP."""
    import torch

    for head, mlp in ((80, None), (88, 768)):
        options = dataclasses.replace(
            SMALL, activation="gelu", image_width=2 * head, image_heads=2, image_mlp=mlp, image_depth=1, text_depth=1
        )
        model = open_clip_model(open_clip, options)
        torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
        vision = {"width": 2 * head, "layers": 1, "head_width": head, "patch_size": 8, "image_size": 32}
        text = {"width": 48, "layers": 1, "heads": 3, "context_length": 9, "vocab_size": 50}
        config = {"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        clip, params = importer.load(tmp_path / "open_clip_pytorch_model.bin")
        assert clip.options == options
        images, captions = inputs(options)
        with torch.no_grad():
            pixels = torch.tensor(np.asarray(preprocess(images, 32))).permute(0, 3, 1, 2)
            theirs = model.encode_image(pixels, normalize=True).numpy()
        np.testing.assert_allclose(encode(clip, params, images, captions)[0], theirs, atol=1e-4)


@pytest.mark.slow
def test_same_vectors_as_open_clip_at_full_size(open_clip):
    model = shake(open_clip.create_model("ViT-B-32-quickgelu", pretrained=None))
    assert max(open_clip_differences(model, CLIPOptions(), 64)) < 1e-4


# -- Hugging Face -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="needs torch==2.13.0")
    if importlib.util.find_spec("torchvision"):
        import_torchvision()  # transformers imports it if it is installed
    return pytest.importorskip("transformers", reason="needs transformers==5.23.0")


def transformers_model(transformers, options, hidden_act="quick_gelu"):
    vision = {
        "hidden_size": options.image_width, "intermediate_size": 4 * options.image_width, "patch_size": options.patch,
        "num_hidden_layers": options.image_depth, "num_attention_heads": options.image_heads,
        "image_size": options.image_size, "hidden_act": hidden_act,
    }  # fmt: skip
    text = {
        "hidden_size": options.text_width, "intermediate_size": 4 * options.text_width,
        "num_hidden_layers": options.text_depth, "num_attention_heads": options.text_heads,
        "vocab_size": options.text_vocab, "max_position_embeddings": options.text_length, "hidden_act": hidden_act,
        "eos_token_id": options.end_id, "bos_token_id": options.end_id - 1, "pad_token_id": options.end_id,
    }  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=options.embed_dim)
    return shake(transformers.CLIPModel(config))


def transformers_differences(model, options, head_dim):
    def run(pixels, text):
        made = model(input_ids=text, pixel_values=pixels)
        return made.image_embeds, made.text_embeds

    return differences(run, state(model), options, head_dim)


def test_same_vectors_as_transformers(transformers):
    assert max(transformers_differences(transformers_model(transformers, SMALL), SMALL, 16)) < 1e-4


# -- files --------------------------------------------------------------------------------------------------------


def random_arrays(options=SMALL):
    """Returns a state dict by OpenAI's names, without torch."""
    rng, o = np.random.default_rng(0), options
    shapes = {
        "logit_scale": (), "positional_embedding": (o.text_length, o.text_width),
        "token_embedding.weight": (o.text_vocab, o.text_width), "text_projection": (o.text_width, o.embed_dim),
        "visual.class_embedding": (o.image_width,), "visual.positional_embedding": (1 + o.patches, o.image_width),
        "visual.conv1.weight": (o.image_width, 3, o.patch, o.patch), "visual.proj": (o.image_width, o.embed_dim),
    }  # fmt: skip
    norms = {"ln_final": o.text_width, "visual.ln_pre": o.image_width, "visual.ln_post": o.image_width}
    for prefix, d, depth in (
        ("visual.transformer.resblocks", o.image_width, o.image_depth),
        ("transformer.resblocks", o.text_width, o.text_depth),
    ):
        for i in range(depth):
            block = f"{prefix}.{i}"
            norms |= {f"{block}.ln_1": d, f"{block}.ln_2": d}
            shapes |= {f"{block}.attn.in_proj_weight": (3 * d, d), f"{block}.attn.in_proj_bias": (3 * d,)}
            for name, out, inner in (("attn.out_proj", d, d), ("mlp.c_fc", 4 * d, d), ("mlp.c_proj", d, 4 * d)):
                shapes |= {f"{block}.{name}.weight": (out, inner), f"{block}.{name}.bias": (out,)}
    shapes |= {f"{name}.{kind}": (d,) for name, d in norms.items() for kind in ("weight", "bias")}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def hugging_face_names(arrays):
    """Returns the same arrays in the layout of Hugging Face, independent of the table of the importer."""
    towers = {"visual.transformer.resblocks": "vision_model", "transformer.resblocks": "text_model"}
    plain = {
        "logit_scale": "logit_scale", "text_projection": "text_projection.weight",
        "visual.proj": "visual_projection.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }  # fmt: skip
    inner = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    made = {
        "text_model.embeddings.position_ids": np.arange(9)[None],
        "vision_model.embeddings.position_ids": np.zeros(1),
    }
    for name, array in arrays.items():
        tower = next((prefix for prefix in towers if name.startswith(prefix)), None)
        stem, _, kind = name.rpartition(".")
        if tower is None:
            new = plain.get(name) or f"{plain[stem]}.{kind}"
            made[new] = array.T if name in ("text_projection", "visual.proj") else array
            continue
        number, _, part = name.removeprefix(tower + ".").partition(".")
        layer = f"{towers[tower]}.encoder.layers.{number}"
        if "in_proj" in part:
            for letter, third in zip("qkv", np.split(array, 3)):
                made[f"{layer}.self_attn.{letter}_proj.{part.rpartition('_')[2]}"] = third
        else:
            made[f"{layer}.{inner[part.rpartition('.')[0]]}.{kind}"] = array
    return made


def same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.fixture(scope="module")
def expected():
    return importer.convert(random_arrays(), SMALL)


@pytest.mark.parametrize("layout", ["openai", "hugging face"])
@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_plain_files(tmp_path, expected, kind, layout):
    arrays, path = random_arrays(), tmp_path / "weights"
    arrays = hugging_face_names(arrays) if layout == "hugging face" else arrays
    if kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, **arrays)
    else:
        contiguous = {name: array.copy(order="C") for name, array in arrays.items()}
        pytest.importorskip("safetensors.numpy").save_file(contiguous, path)
    clip, params = importer.load(path, *SETTINGS)
    assert clip.options == SMALL
    same(params, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # how OpenAI's files were written
@pytest.mark.parametrize("kind", ["state dict", "checkpoint", "scripted"])
def test_files_by_torch(tmp_path, expected, kind):
    torch = pytest.importorskip("torch", reason="torch writes the files of this test")
    tensors, path = {name: torch.tensor(array) for name, array in random_arrays().items()}, tmp_path / "weights.pt"
    if kind == "scripted":  # as OpenAI publishes it: nested modules and their code
        root = torch.nn.Module()
        for name, tensor in tensors.items():
            *parents, leaf = name.split(".")
            node = root
            for parent in parents:
                if not hasattr(node, parent):
                    node.add_module(parent, torch.nn.Module())
                node = getattr(node, parent)
            node.register_parameter(leaf, torch.nn.Parameter(tensor))
        root.register_buffer("input_resolution", torch.tensor(32))
        torch.jit.save(torch.jit.script(root), path)
    else:
        wrapped = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}
        torch.save(wrapped if kind == "checkpoint" else tensors, path)
    same(importer.load(path, *SETTINGS)[1], expected)


def test_weights_that_do_not_fit():
    arrays = random_arrays()
    for name, changed, token in [
        ("ln_final.bias", None, "text/norm_after/norm/bias"),
        ("visual.ln_post.weight", np.zeros(5), "image/norm_after/norm/scale"),
        ("transformer.resblocks.0.attn.in_proj_weight", np.zeros((5, 48)), "block_0/qkv/kernel"),
        ("ln_final.weight", np.full(48, np.nan), r"ln_final\.weight.*NaN"),
        ("ln_final.weight", np.full(48, -np.inf, np.float16), r"ln_final\.weight.*infinity"),
        ("ln_final.weight", np.full(48, 1e300), r"ln_final\.weight.*too large"),
        ("ln_final.weight", np.ones(48, np.int8), r"ln_final\.weight.*int8"),
        ("ln_final.weight", np.ones(48, bool), r"ln_final\.weight.*bool"),
        ("visual.layer1.weight", np.zeros(3), r"visual\.layer1\.weight"),
    ]:
        wrong = {**arrays, name: changed}
        if changed is None:
            del wrong[name]
        with pytest.raises(PretrainedError, match=token):
            importer.convert(wrong, SMALL)
    with pytest.raises(PretrainedError, match=r"visual\.conv1"):
        importer.options_of({"weight": np.zeros(3)}, *OPTIONS)
    halved = hugging_face_names(arrays)
    del halved["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(PretrainedError, match=r"k_proj\.bias"):
        importer.openai_names(halved)


def small_vocabulary(path):
    """Writes a `tokenizer.json` of 50 tokens: letters, parts of "red", and two special tokens at the end."""
    from dalle_jax.data import byte_pairs

    letters = "abcdefghijklmnopqrstuvw"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    made = byte_pairs._from_merges({token: i for i, token in enumerate(tokens)}, [("r", "e"), ("re", "d</w>")])
    path.write_text(made.to_str())
    return path


def test_the_command_writes_a_folder_that_the_scorer_reads(tmp_path, expected):
    pytest.importorskip("tokenizers", reason="the vocabulary of published weights needs tokenizers")
    weights, vocabulary = tmp_path / "weights.npz", small_vocabulary(tmp_path / "tokenizer.json")
    np.savez(weights, **random_arrays())
    command = ["-m", "dalle_jax.pretrained.clip", f"--weights={weights}", "--activation=quick_gelu"]
    command += ["--image_head_dim=16", "--text_head_dim=16"]
    command += [f"--vocabulary={vocabulary}", f"--output={tmp_path}/imported"]
    ((status, _, error),) = finish([spawn(command)])
    assert status == 0, error
    scorer = ClipScorer.load(tmp_path / "imported")
    assert scorer.clip.options == SMALL
    same(scorer.params, expected)
    assert scorer.encode_text(["Red bed"]).tolist() == [[48, 47, 1, 4, 26, 49, 49, 49, 49]]


def test_weights_and_vocabulary_that_do_not_belong_together(tmp_path):
    pytest.importorskip("tokenizers", reason="the vocabulary of published weights needs tokenizers")
    weights, vocabulary = tmp_path / "weights.npz", small_vocabulary(tmp_path / "tokenizer.json")
    np.savez(weights, **random_arrays())
    other = json.loads(vocabulary.read_text())
    other["model"]["vocab"]["<|endoftext|>"] = 77
    vocabulary.write_text(json.dumps(other))
    with pytest.raises(PretrainedError, match="77"):
        importer.load_scorer(weights, vocabulary, *SETTINGS)


# -- what the arrays leave open, and what is no CLIP ---------------------------------------------------------------


def test_head_dims_that_do_not_fit_are_named():
    for size in (0, -16, 25):
        with pytest.raises(PretrainedError, match=f"--image_head_dim={size}"):
            importer.options_of(random_arrays(), "gelu", (size, 16))
        with pytest.raises(PretrainedError, match=f"--text_head_dim={size}"):
            importer.options_of(random_arrays(), "gelu", (16, size))


def test_settings_that_nothing_says_are_asked_for(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **random_arrays())
    with pytest.raises(PretrainedError, match="--activation.*--image_head_dim.*--text_head_dim"):
        importer.load(path)
    (tmp_path / "config.json").write_text("[]")
    assert importer.load(path, *SETTINGS)[0].options == SMALL, "nothing is read that is not needed"


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("visual.layer1.0.conv1.weight", "ResNet"), ("logit_bias", "SigLIP"), ("visual.trunk.norm.weight", "timm"),
        ("vision_model.head.probe", "SigLIP"), ("visual.blocks.0.norm1.weight", "EVA"),
        ("text.transformer.resblocks.0.ln_1.weight", "CustomTextCLIP"), ("text_decoder.ln_final.weight", "CoCa"),
    ],
)  # fmt: skip
def test_other_models_are_named(name, token):
    with pytest.raises(PretrainedError, match=token):
        importer.options_of({**random_arrays(), name: np.zeros(1)}, *OPTIONS)


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("blocks.group_1.block_1.id_path.w", "dVAE"), ("Mixed_5b.branch1x1.conv.weight", "Inception"),
        ("text_model.encoder.layers.0.layer_norm1.weight", "Stable Diffusion"), ("a", "visual.conv1"),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_named(name, token):
    with pytest.raises(PretrainedError, match=token):
        importer.options_of(importer.openai_names({name: np.zeros(1)}), *OPTIONS)


@pytest.mark.parametrize("number", ["7", "999999", "9" * 5000])
def test_missing_or_endless_blocks_are_rejected_at_once(number):
    arrays = {**random_arrays(), f"visual.transformer.resblocks.{number}.ln_1.weight": np.zeros(64)}
    with pytest.raises(PretrainedError, match="blocks|block_"):
        importer.convert(arrays, importer.options_of(arrays, *OPTIONS))


@pytest.mark.parametrize("prefix", ["module.", "model._orig_mod.", "_orig_mod.module.", "clip_model.", "clip."])
def test_prefixes_of_wrappers_are_removed(tmp_path, prefix):
    np.savez(tmp_path / "a.npz", **{f"{prefix}{name}": array for name, array in random_arrays().items()})
    assert state_dict.read(tmp_path / "a.npz").keys() == random_arrays().keys()


def test_names_that_differ_only_in_the_prefix_are_rejected(tmp_path):
    np.savez(tmp_path / "a.npz", **{"module.logit_scale": np.zeros(()), "logit_scale": np.ones(())})
    with pytest.raises(PretrainedError, match="logit_scale.*twice"):
        state_dict.read(tmp_path / "a.npz")
