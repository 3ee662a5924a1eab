"""The import of MaskGIT's published models: golden logits, the image tokenizer, drawing, and files that do not fit.

tests/golden/published holds random weights in the published layout, and what the authors' code computes from them.
"""

import dataclasses
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import PIL.Image
import plain_maskgit
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from dalle_jax import TextToImage
from dalle_jax.checkpoints import workdir
from dalle_jax.configuration import config_files
from dalle_jax.errors import ConfigError, DataError, PretrainedError
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.image_tokenizers.vector_quantizer import nearest
from dalle_jax.image_tokenizers.vqgan import VQGANTokenizer
from dalle_jax.jobs import generate, train
from dalle_jax.pretrained import catalogue, maskgit, maskgit_tokenizer, state_dict
from dalle_jax.priors.registry import condition_of, make
from dalle_jax.token_layout import TokenLayout

GOLDEN = Path(__file__).parents[1] / "golden" / "published"
TRANSFORMER = GOLDEN / "maskgit_checkpoint"
NAME, OTHER = "maskgit-imagenet256", "maskgit-imagenet512"
TINY = (24, 6, 32, (1, 1))  # codes (those of the golden transformer), width, filters, multipliers
DEFAULTS = {"names": None, "dtype": "float32"}


def write(path, arrays):
    """Writes arrays as the authors' checkpoints are written."""
    nested = traverse_util.unflatten_dict({tuple(name.split("/")): array for name, array in arrays.items()})
    path.write_bytes(flax.serialization.to_bytes({"params": nested}))
    return path


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The golden transformer and a tiny image tokenizer. The "published" size is theirs, a grid of 4 x 4, 2 steps."""
    monkeypatch.setattr(maskgit, "PUBLISHED", {NAME: (4, 2), OTHER: (8, 2)})
    return [TRANSFORMER, write(tmp_path / "tokenizer", plain_maskgit.random_arrays(*TINY))]


# -- the transformer ----------------------------------------------------------------------------------------------


def test_golden_logits():
    arrays, golden = state_dict.read(TRANSFORMER), np.load(GOLDEN / "maskgit.npz")
    prior = maskgit.prior_of(maskgit.check(arrays), 24, 8)
    params = maskgit.convert(arrays, prior)
    ids, expected = golden["ids"], golden["logits"][:, 1:, :24]
    tokens = np.where(ids[:, 1:] == -1, prior.layout.mask_id, ids[:, 1:])
    text = ids[:, :1] - 24
    run = jax.jit(lambda params, *args: prior.model.apply({"params": params}, *args))
    np.testing.assert_allclose(run(params, text, tokens), expected, atol=1e-4)
    assert (ids == -1).any() and (ids[:, 1:] >= 0).any() and np.std(expected) > 0.1
    apply = lambda params, *args, method: prior.model.apply({"params": params}, *args, method=method)
    steps = jax.jit(
        lambda params, text, ids: apply(params, ids, apply(params, text, method="prefill"), method="refine")
    )
    np.testing.assert_allclose(steps(params, text, tokens), expected, atol=1e-4)  # as decoding computes them


def test_sizes_at_the_published_size():
    for one in maskgit.IMPORTERS:
        side, _ = maskgit.PUBLISHED[one.name]
        sizes = maskgit.Sizes(24, {"D": 768, "H": 16, "K": 48, "F": 3072, "W": 1024 + 1000 + 1, "S": side**2 + 1})
        shapes = [*sizes.shapes().values(), *plain_maskgit.shapes(1024, 256, 128, (1, 1, 2, 2, 4)).values()]
        assert one.parameters == sum(np.prod(shape, dtype=int) for shape in shapes)
        prior = maskgit.prior_of(sizes, 1024, 8)
        assert (prior.layout.condition.vocab, prior.options.trunk.hidden) == (1000, 3072)
    layout = maskgit_tokenizer.layout(maskgit_tokenizer.options())
    assert sum(np.prod(shape, dtype=int) for _, shape in layout.values()) == 54_515_587


@pytest.mark.parametrize("size", [256, 512])
def test_the_variants_train_the_published_models(size):
    """maskgit.py:imagenet256 and :imagenet512 differ in what guidance and training need, and in nothing else."""
    config = config_files.load(f"configs/maskgit.py:imagenet{size}")
    side, steps = maskgit.PUBLISHED[f"maskgit-imagenet{size}"]
    sizes = maskgit.Sizes(24, {"D": 768, "H": 16, "K": 48, "F": 3072, "W": 1024 + 1000 + 1, "S": side**2 + 1})
    published, images = maskgit.prior_of(sizes, 1024, steps), tokenizers.of_training(config.tokenizer)
    layout = TokenLayout(condition_of(config).of_config(config), images.vocab_size, *images.grid(size))
    ours = make(config.prior, config.model, layout)
    how = dict(dtype="float32", scan=False, remat="none", head_dim=48)
    trunk = dataclasses.replace(ours.options.trunk, **how)
    assert ours.layout == published.layout and ours.decoding_steps(None) == steps
    assert dataclasses.replace(ours.options, trunk=trunk, caption_drop=0.0, steps=steps) == published.options


# -- the image tokenizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [TINY, (40, 8, 32, (1, 1, 2))], ids=["tiny", "larger"])
def test_the_image_tokenizer_computes_what_the_plain_functions_compute(sizes):
    arrays = plain_maskgit.random_arrays(*sizes)
    options = maskgit_tokenizer.options_of(arrays)
    tokenizer, params = VQGANTokenizer(options), maskgit_tokenizer.convert(arrays, options)
    images = np.random.RandomState(1).randint(0, 256, (2, 32, 48, 3)).astype(np.uint8)
    expected = plain_maskgit.outputs(arrays, images.astype(np.float32) / 255)
    np.testing.assert_allclose(jax.jit(tokenizer.features)(params, images), expected["features"], atol=1e-4)
    np.testing.assert_array_equal(jax.jit(tokenizer.encode)(params, images), expected["tokens"])
    shown = jax.jit(tokenizer.decode)(params, expected["tokens"])
    np.testing.assert_allclose(shown, np.clip(expected["pixels"], 0, 1), atol=1e-4)
    assert len(np.unique(expected["tokens"])) > 8 and 0.2 < np.mean((shown > 0) & (shown < 1))
    assert nearest(expected["features"].reshape(-1, sizes[1]), arrays["quantizer/codebook"]).max() < sizes[0]


# -- the workdir --------------------------------------------------------------------------------------------------


def test_an_imported_model_draws_classes(tmp_path, files):
    run = str(tmp_path / "run")
    assert "10 classes" in catalogue.import_files(NAME, files, run, {})
    model = TextToImage.load(run)
    images = model.generate("class: 3", n=2, seed=1)
    assert images.shape == (2, 8, 8, 3) and images.dtype == np.uint8 and np.std(images) > 5
    np.testing.assert_array_equal(images, model.generate("3", n=2, seed=1))
    assert np.any(images != model.generate("class: 4", n=2, seed=1))
    assert model.prior.decoding_steps(None) == 2 and model.prior.options.choice_temperature == 4.5
    with pytest.raises(DataError, match="class: 9"):
        model.generate("class: 10")
    with pytest.raises(DataError, match="class: 9"):
        model.generate("a red cat")
    again, _ = workdir.load_tokenizer(run)  # for `tokenizer_from`
    assert again.options.pixel_range == "unit" and again.image_size == 8


def test_the_command_draws(tmp_path, files):
    (tmp_path / "names.txt").write_text("\n".join(["tench", "goldfish", *"abcdefgh", ""]))
    run = str(tmp_path / "run")
    catalogue.import_files(NAME, files[::-1], run, {"names": str(tmp_path / "names.txt")})
    config = config_files.load("configs/generate.py")
    config.model_workdir, config.prompts, config.n = run, "class: 3|goldfish", 1
    generate.run(config, str(tmp_path / "images"))
    assert len(list((tmp_path / "images").glob("*.png"))) == 3  # two images and the grid


@pytest.fixture
def training(tmp_path, files):
    """A configuration that trains the imported model on images of two classes."""
    catalogue.import_files(NAME, files, str(tmp_path / "run"), {})
    for number, caption in enumerate(["class: 3", "7"]):
        image = PIL.Image.fromarray(np.full((8, 8, 3), 90 * number, np.uint8))
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(caption)
    config = config_files.load("configs/maskgit.py:shapes")
    stored = workdir.read_config(tmp_path / "run")
    with config.unlocked():
        config.model = ConfigDict(stored["model"])
    config.update_from_flattened_dict(
        {
            "start_from": str(tmp_path / "run"), "data.source": "folder", "data.path": str(tmp_path / "images"),
            "data.builder_kwargs": {}, "data.image_size": stored["data"]["image_size"], "data.train_split": "all",
            "data.eval_split": "all", "text.vocab_size": 10, "text.length": 1, "batch_size": 2, "eval_batches": 1,
            "mesh.data": 1, "steps": 1, "cadence.log": 1, "cadence.eval": 1, "cadence.preview": 0,
            "cadence.checkpoint": 1, "schedules.learning_rate": {"kind": "constant", "value": 1e-3},
        }
    )  # fmt: skip
    return config


@pytest.mark.slow
def test_a_training_starts_from_an_imported_model(tmp_path, training):
    state = train.run(training, str(tmp_path / "new"))
    before, after = (TextToImage.load(str(tmp_path / folder)) for folder in ("run", "new"))
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before.params, after.params)
    assert int(state.step) == 1 and 0 < max(jax.tree.leaves(moved)) < 0.01
    assert after.text_model.vocab_size == 10 and after.tokenizer == before.tokenizer
    assert workdir.text_model_path(tmp_path / "new").name == "labels.json"


def test_labels_have_no_bpe_dropout(tmp_path, training):
    training.data.bpe_dropout = 0.1
    with pytest.raises(ConfigError, match="bpe_dropout=0"):
        train.run(training, str(tmp_path / "new"))


# -- files that do not fit ----------------------------------------------------------------------------------------


def changed(name, shape):
    arrays = dict(state_dict.read(TRANSFORMER))
    arrays.pop(name, None)
    return arrays if shape is None else arrays | {name: np.zeros(shape, np.float32)}


@pytest.mark.parametrize(
    ("name", "shape", "tokens"),
    [
        ("TransformerLayer_1/Mlp_0/layer_output/bias", None, ["missing", "TransformerLayer_1/Mlp_0/layer_output/bias"]),
        ("MlmLayer_0/mlm_bias/bias", (34,), ["another shape", r"MlmLayer_0/mlm_bias/bias \[34\]"]),
        ("Embed_0/hidden_mapping/kernel", (2, 2), ["unexpected", "Embed_0/hidden_mapping/kernel"]),
        ("Embed_0/word_embeddings/embedding", None, ["Embed_0/word_embeddings/embedding"]),
        ("TransformerLayer_3/Mlp_0/layer_output/bias", (32,), ["missing", "TransformerLayer_2"]),
    ],
)
def test_arrays_of_the_transformer_that_do_not_fit_are_named(tmp_path, files, name, shape, tokens):
    given = [write(tmp_path / "partial", changed(name, shape)), files[1]]
    with pytest.raises(PretrainedError, match="partial.*" + ".*".join(tokens)) as caught:
        catalogue.import_files(OTHER, given, str(tmp_path / "run"), {})
    assert NAME not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "shape", "tokens"),
    [
        ("encoder/ResBlock_1/Conv_0/kernel", None, ["missing", "encoder/ResBlock_1/Conv_0/kernel"]),
        ("decoder/Conv_1/bias", (5,), ["another shape", r"decoder/Conv_1/bias \[5\]"]),
        ("encoder/ResBlock_1/Conv_0/bias", (32,), ["unexpected", "encoder/ResBlock_1/Conv_0/bias"]),
        ("encoder/ResBlock_9/Conv_0/kernel", (1,), ["10 residual blocks"]),
        ("quantizer/codebook", (3,), ["quantizer/codebook"]),
    ],
)
def test_arrays_of_the_image_tokenizer_that_do_not_fit_are_named(tmp_path, files, name, shape, tokens):
    arrays = plain_maskgit.random_arrays(*TINY)
    arrays.pop(name, None)
    arrays |= {} if shape is None else {name: np.zeros(shape, np.float32)}
    given = [TRANSFORMER, write(tmp_path / "partial", arrays)]
    with pytest.raises(PretrainedError, match="partial.*" + ".*".join(tokens)):
        catalogue.import_files(NAME, given, str(tmp_path / "run"), {})


def test_files_of_two_models(tmp_path, files):
    with pytest.raises(PretrainedError, match=f"holds the weights of {NAME}, not of {OTHER}"):
        catalogue.import_files(OTHER, files, str(tmp_path / "run"), {})
    more_codes = write(tmp_path / "more", plain_maskgit.random_arrays(35, *TINY[1:]))
    with pytest.raises(PretrainedError, match="35"):
        catalogue.import_files(NAME, [TRANSFORMER, more_codes], str(tmp_path / "run"), {})


@pytest.mark.parametrize(("content", "token"), [("a\nb\n", "2 classes"), (b"\xff\xfe", "names"), (None, "names")])
def test_names_that_do_not_fit(tmp_path, files, content, token):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=token):
        catalogue.import_files(NAME, files, str(tmp_path / "run"), {"names": str(path)})
    assert not (tmp_path / "run").exists()


def test_an_interrupted_import_is_not_continued(tmp_path, files):
    run = tmp_path / "run"
    catalogue.import_files(NAME, files, str(run), {})
    with pytest.raises(ConfigError, match="--output"):
        catalogue.import_files(NAME, files, str(run), {})
    (run / "config.json").unlink()
    with pytest.raises(ConfigError, match="--output"):
        catalogue.import_files(NAME, files, str(run), {})


# -- msgpack ------------------------------------------------------------------------------------------------------


def test_half_precision_files(tmp_path, files):
    arrays = {name: array.astype(np.float16) for name, array in state_dict.read(TRANSFORMER).items()}
    given = [write(tmp_path / "half", arrays), files[1]]
    assert state_dict.read(given[0])["MlmLayer_0/mlm_bias/bias"].dtype == np.float16
    catalogue.import_files(NAME, given, str(tmp_path / "run"), {"dtype": "bfloat16"})
    assert TextToImage.load(str(tmp_path / "run")).prior.options.trunk.dtype == "bfloat16"


@pytest.mark.parametrize(
    "content",
    [
        TRANSFORMER.read_bytes()[:-100],
        b"\x81\xa6params\xdf\xff\xff\xff\xff\xa1a\x01",  # a map with more entries than bytes
        b"\x81\xa6params\x81\xa1a\xc6\xff\xff\xff\xffabc",  # as many bytes
        b"\x81\xa1a" * 20_000 + b"\x01",  # nested deeply
        flax.serialization.msgpack_serialize({"params": {"a": 3}}),
        flax.serialization.msgpack_serialize({"a": np.array(["x"])}),
    ],
    ids=["cut", "map", "bytes", "nested", "number", "letters"],
)
def test_damaged_and_hostile_msgpack(tmp_path, content):
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    with pytest.raises(PretrainedError, match="checkpoint"):
        maskgit.check(state_dict.read(path)) if b"params" not in content else state_dict.read(path)
