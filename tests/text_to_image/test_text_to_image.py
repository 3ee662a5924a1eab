"""The whole way at tiny sizes: trainings in order, then images, manifests, completion and evaluation from a workdir."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from best_checkpoint import with_a_worse_checkpoint
from PIL import Image

from dalle_jax import TextToImage
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.configuration import config_files
from dalle_jax.configuration.options import from_config
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import TextModel
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import batch_shards
from dalle_jax.errors import CheckpointError, ConfigError, DataError
from dalle_jax.jobs import evaluate, generate
from dalle_jax.jobs import train as train_job
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.priors import registry
from dalle_jax.priors.sampling import SamplingOptions
from dalle_jax.pytree import fingerprint
from dalle_jax.tasks import encoded_split
from dalle_jax.tasks.encoded_split import tokens_of_split
from dalle_jax.tasks.prior import PriorTask
from dalle_jax.tasks.registry import build
from dalle_jax.text_to_image import drawing, loading
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.text_to_image.drawing import row_keys

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CAPTION = "a red circle above a blue square"


def tiny_prior(folder, data_dir):
    """configs/prior.py at tiny sizes: images of 16 pixels, 4×4 tokens, three steps of each training."""
    config = config_files.load(f"{CONFIGS}/prior.py:shapes")
    shapes = {
        "image_size": 16, "data_dir": str(data_dir),
        "builder_kwargs": {"image_size": 16, "num_train": 64, "num_validation": 16, "num_heldout": 16},
    }  # fmt: skip
    run = {
        "batch_size": 16, "steps": 3, "eval_batches": 1,
        "cadence": {"log": 1, "eval": 3, "preview": 3, "checkpoint": 3},
    }  # fmt: skip
    config.update({"workdir": str(folder / "prior"), "data": shapes, **run})
    config.update({
        "text": {"vocab_size": 64, "length": 20},
        "model": {"trunk": {"width": 16, "depth": 2, "heads": 2}},
        "mesh": {"data": 1},
    })  # fmt: skip
    config.tokenizer.update({"workdir": str(folder / "dvae"), "data": shapes, **run})
    config.tokenizer.update({
        "model": {"vocab_size": 16, "hidden": 96, "blocks_per_group": 1, "codebook_dim": 96}, "mesh": {"data": 1},
    })  # fmt: skip
    return config


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished training of the tiny prior."""

    config: Any
    workdir: str
    params: Any


ON_A_GPU = {"attention_kernel": "cudnn", "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The prior, trained from scratch."""
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_prior(folder, tmp_path_factory.mktemp("data"))
    state = train_job.run(config, config.workdir)
    assert int(state.step) == 3
    return Trained(config, config.workdir, jax.device_get(state.params))


@pytest.fixture(scope="module")
def model(trained):
    # Chunks of two rows, so that nearly every call below uses the same compiled program.
    return TextToImage.load(trained.workdir, rows_at_once=2, mesh=make_mesh(data=1))


@pytest.fixture(scope="module")
def original():
    blocks = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    return blocks.repeat(4, axis=0).repeat(4, axis=1)


# -- trainings in order -------------------------------------------------------------------------------------------


def test_a_prior_trains_its_tokenizer_first(trained):
    config, workdir = trained.config, trained.workdir
    inner = config.tokenizer.workdir
    assert workdirs.is_complete(inner, config.tokenizer) and workdirs.read_config(inner)["task"] == "dvae"
    assert workdirs.has_tokenizer(workdir), "a prior's workdir is all that generation needs"
    _, frozen = workdirs.load_tokenizer(workdir)
    _, own = workdirs.load_tokenizer(inner)
    assert jax.tree.all(jax.tree.map(np.array_equal, frozen, own))
    names = {"config.json", "checkpoints", "metrics.jsonl", "tensorboard", "samples", "text", "image_tokenizer"}
    assert names <= {path.name for path in pathlib.Path(workdir).iterdir()}
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    seen = set().union(*rows)
    assert {"train/image_nats", "train/text_nats", "eval/image_nats", "train/learning_rate"} <= seen
    assert next((pathlib.Path(workdir) / "samples").rglob("*.png"))


def test_a_training_with_the_kernel_of_a_gpu_is_loaded_on_a_cpu(trained, monkeypatch):
    stored = Checkpoints.config

    def config(self, step):
        found = stored(self, step)
        return {**found, "model": {**found["model"], "trunk": found["model"]["trunk"] | ON_A_GPU}}

    monkeypatch.setattr(Checkpoints, "config", config)
    model = TextToImage.load(trained.workdir, rows_at_once=2, mesh=make_mesh(data=1))
    assert model.prior.options.trunk.attention_kernel == "auto"


def test_truncated_captions_are_in_the_metrics(trained):
    """Most captions are longer than 20 tokens of so small a vocabulary."""
    rows = [json.loads(line) for line in (pathlib.Path(trained.workdir) / "metrics.jsonl").read_text().splitlines()]
    counts = [row["train/captions_truncated"] for row in rows if "train/captions_truncated" in row]
    assert len(counts) == 3 and all(16 < count <= 64 for count in counts)


def test_the_same_command_again_trains_nothing(trained, capsys):
    config, workdir = trained.config, trained.workdir
    before = {p: p.stat().st_mtime_ns for p in pathlib.Path(config.tokenizer.workdir).rglob("*") if p.is_file()}
    assert int(train_job.run(config, workdir).step) == 3
    assert "complete" in "".join(capsys.readouterr())
    assert before == {p: p.stat().st_mtime_ns for p in pathlib.Path(config.tokenizer.workdir).rglob("*") if p.is_file()}


def test_another_runs_tokenizer_and_tokens_of_each_batch(trained, tmp_path):
    """The same training, with the tokenizer of another run and the images encoded batch by batch."""
    config = trained.config.copy_and_resolve_references()
    config.update({"tokenizer_from": trained.workdir, "data_tokens": "each_batch", "workdir": str(tmp_path / "second")})
    config.tokenizer.workdir = str(tmp_path / "untouched")
    state = train_job.run(config, config.workdir)
    assert workdirs.has_tokenizer(config.workdir) and not (tmp_path / "untouched").exists()
    for (path, a), b in zip(jax.tree.leaves_with_path(state.params), jax.tree.leaves(trained.params)):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=jax.tree_util.keystr(path))

    config.tokenizer_from, config.workdir = str(tmp_path / "nowhere"), str(tmp_path / "third")
    with pytest.raises(ConfigError, match="tokenizer_from.*nowhere"):
        train_job.run(config, config.workdir)


def test_the_tokens_of_the_training_split_are_computed_once(trained, tmp_path, monkeypatch):
    """A run that resumes, and one that starts from it, read them. Another tokenizer has other tokens."""
    options = from_config(DataOptions, trained.config.data, "data")
    tokenizer, params = workdirs.load_tokenizer(trained.workdir)
    (file,) = pathlib.Path(trained.workdir).glob("tokens-*/part-*.npy")
    encode = encoded_split.encode_parts
    ((_, (rows, _)),) = encode(options, "train", tokenizer, params, [0])
    np.testing.assert_array_equal(np.load(file), rows)

    encoded = []
    monkeypatch.setattr(encoded_split, "encode_parts", lambda *args: encoded.append(args) or encode(*args))

    def get(params, options, *folders):
        tokens = tokens_of_split(options, "train", tokenizer, params, folders)
        return np.array([tokens.row(index) for index in range(len(tokens))])

    kept = get(params, options, tmp_path, trained.workdir)
    np.testing.assert_array_equal(kept, np.load(file))
    assert not encoded and not list(tmp_path.iterdir())
    other = jax.tree.map(lambda x: -x, params)
    for _ in range(2):
        assert (get(other, options, tmp_path, trained.workdir) != kept).any()
    assert len(encoded) == 1 and len(list(tmp_path.iterdir())) == 1

    folder = tmp_path / "folder"
    folder.mkdir()
    changing = DataOptions(source="folder", path=str(folder), image_size=16)
    for level in (0, 255):
        Image.fromarray(np.full((16, 16, 3), level, np.uint8)).save(folder / "a.png")
        for _ in range(2):
            get(params, changing, tmp_path)
    assert len(encoded) == 3, "an image of the folder has changed once"


def test_a_prior_starts_with_its_tokenizers_codebook(trained):
    """Tokens with similar codes have similar embeddings before the first update."""
    config = trained.config.copy_and_resolve_references()
    config.model.codebook_init = True
    init = build(config, trained.workdir).task.init
    fresh = nn.meta.unbox(jax.jit(init)(jax.random.key(0)))["embedding"]["image"]
    _, params = workdirs.load_tokenizer(trained.workdir)
    distances = lambda x: np.linalg.norm(np.asarray(x)[:, None] - np.asarray(x)[None], axis=-1).ravel()
    codes = distances(params["codebook"]["kernel"])
    assert np.corrcoef(distances(fresh), codes)[0, 1] > 0.6


def test_maskgit_starts_from_the_autoregressive_prior(trained, tmp_path):
    """`start_from` takes tokenizer, text model, trunk and embeddings from the autoregressive prior."""
    config = config_files.load(f"{CONFIGS}/maskgit.py:shapes")
    for section in ("data", "text", "mesh"):
        config[section] = trained.config[section].copy_and_resolve_references()
    config.model.trunk = trained.config.model.trunk.copy_and_resolve_references()
    config.update(
        {"steps": 1, "batch_size": 16, "eval_batches": 1, "start_from": trained.workdir, "workdir": str(tmp_path)}
    )
    config.schedules.learning_rate = {"kind": "constant", "value": 0.0}
    state = train_job.run(config, config.workdir)
    _, theirs = workdirs.load_tokenizer(trained.workdir)
    jax.tree.map(np.testing.assert_array_equal, workdirs.load_tokenizer(tmp_path)[1], theirs)
    assert workdirs.text_model_path(tmp_path).read_bytes() == workdirs.text_model_path(trained.workdir).read_bytes()
    with Checkpoints(trained.workdir, read_only=True) as checkpoints:
        before = checkpoints.restore_params()
    jax.tree.map(np.testing.assert_array_equal, state.params["trunk"], before["trunk"])
    shared = set(before["embedding"]) - {"text_head_kernel"}
    assert shared < set(state.params["embedding"])
    for name in shared:
        np.testing.assert_array_equal(state.params["embedding"][name], before["embedding"][name])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"data_tokens": "twice"}, "data_tokens"),
        ({"data": {"augment": "prior"}}, "data.augment"),
        ({"data": {"image_size": 18}}, "18"),
        ({"text": {"vocab_size": 30}}, "text.vocab_size"),
        ({"text": {"vocab_size": 0}}, "text.vocab_size"),
        ({"text": {"length": 0}}, "text.length"),
        ({"prior": "diffusion"}, "diffusion"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_configurations_that_do_not_fit_the_workdir(trained, changes, words):
    config = trained.config.copy_and_resolve_references()
    config.update(changes)
    with pytest.raises(ConfigError, match=words):
        train_job.run(config, trained.workdir)


# -- images -------------------------------------------------------------------------------------------------------


def test_generate(model):
    images = model.generate(CAPTION, n=4, seed=1)
    assert images.shape == (4, 16, 16, 3) and images.dtype == np.uint8
    both = model.generate([CAPTION, "a green star"], n=2, seed=1)
    assert both.shape == (2, 2, 16, 16, 3)
    np.testing.assert_array_equal(both[0], images[:2])
    assert (model.generate(CAPTION, n=4, seed=2) != images).any()
    assert model.step == 3 and model.image_size == 16


def test_an_image_depends_only_on_caption_seed_and_number(trained, model):
    """It is the same for any n, among any captions, and in chunks of any size."""
    many = model.generate(CAPTION, n=6, seed=5)  # in three chunks
    np.testing.assert_array_equal(model.generate(CAPTION, n=1, seed=5), many[:1])
    among = model.generate(["a green star", CAPTION, "a small cross"], n=2, seed=5)
    np.testing.assert_array_equal(among[1], many[:2])
    larger = TextToImage.load(trained.workdir, rows_at_once=64, mesh=make_mesh(data=1))
    # Another compiled program decodes these, so that a pixel may be rounded differently.
    np.testing.assert_allclose(larger.generate(CAPTION, n=6, seed=5).astype(int), many.astype(int), rtol=0, atol=1)
    assert len({image.tobytes() for image in many}) > 3


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["rows", "parameters"])
def test_devices_share_the_drawing(trained, model, original, sizes):
    """Each device holds and computes its part of the same images."""
    mesh = make_mesh(**sizes)
    spread = TextToImage.load(trained.workdir, rows_at_once=8, mesh=mesh)
    kernel = spread.params["trunk"]["layer_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * sizes.get("fsdp", 1) * sizes.get("tensor", 1) == kernel.size
    rows = model.encode_text([CAPTION] * 8)
    tokens = drawing.sample(spread, rows, row_keys(0, rows, np.arange(8)), SamplingOptions(), None)
    assert tokens.addressable_shards[0].data.shape[0] == 8 // batch_shards(mesh)
    for draw in (
        lambda model: model.generate([CAPTION, "a green star"], n=4, seed=3),
        lambda model: model.generate(CAPTION, n=3, seed=3, guidance=1.0),
        lambda model: model.complete(original, 2, CAPTION, n=8),
    ):
        # Another compiled program decodes these, so that a pixel may be rounded differently.
        np.testing.assert_allclose(draw(spread).astype(int), draw(model).astype(int), rtol=0, atol=1)


def test_complete_keeps_the_given_rows(model, original):
    given = model.encode(original[None])
    for rows in (0, 2, 4):
        drawn = drawn_tokens(model, lambda rows=rows: model.complete(original, rows, CAPTION, n=2, seed=0))
        np.testing.assert_array_equal(drawn[:, : 4 * rows], np.tile(given[:, : 4 * rows], (len(drawn), 1)))
    whole = model.complete(original, 4, CAPTION, n=2)
    np.testing.assert_array_equal(whole, np.stack([original] * 2))
    np.testing.assert_array_equal(model.complete(original, 0, CAPTION, n=2), model.generate(CAPTION, n=2))


def drawn_tokens(model, call):
    """Returns the tokens that `call` decodes."""
    seen = []
    decode = TextToImage.decode

    def watched(self, tokens):
        seen.append(np.asarray(tokens))
        return decode(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextToImage, "decode", watched)
        call()
    return np.concatenate(seen)


def test_sampling_options_reach_the_sampler(model):
    greedy = model.generate(CAPTION, n=4, temperature=0)
    assert (greedy == greedy[0]).all()
    np.testing.assert_array_equal(model.generate(CAPTION, n=2, top_k=1), greedy[:2])
    np.testing.assert_array_equal(model.generate(CAPTION, n=2, top_p=1e-6), greedy[:2])
    assert (model.generate(CAPTION, n=2, top_k=9, guidance=30.0) != model.generate(CAPTION, n=2, top_k=9)).any()


def test_repr_is_short(trained, model):
    text = repr(model)
    assert len(text) < 600 and str(model) == text
    for part in ("autoregressive", "16 x 16 pixels", "4 x 4 tokens of 16", "step=3", trained.workdir, "scorer=None"):
        assert part in text


# -- errors -------------------------------------------------------------------------------------------------------


def test_invalid_calls_are_rejected(model, original):
    for caption in ("", "  "):
        with pytest.raises(DataError, match="empty"):
            model.generate(caption)
    with pytest.raises(DataError, match="(?i)caption"):
        model.generate([])
    with pytest.raises(DataError, match="255"):
        model.complete(original.astype(np.float32), 1, CAPTION)
    for rows in (-1, 5):
        with pytest.raises(ConfigError, match=f"rows is {rows}"):
            model.complete(original, rows, CAPTION)
    with pytest.raises(ConfigError, match="maskgit.py"):
        model.inpaint(original, np.ones((16, 16), bool), CAPTION)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"guidance": -2.0}, "guidance"),
    ],
)
def test_invalid_sampling_options_are_rejected(options, words):
    with pytest.raises(ConfigError, match=words):
        SamplingOptions(**options)


def test_wrong_workdirs(trained, tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        TextToImage.load(str(tmp_path))
    with pytest.raises(ConfigError, match="'dvae'"):
        TextToImage.load(trained.config.tokenizer.workdir)
    with pytest.raises(CheckpointError, match="17"):
        TextToImage.load(trained.workdir, step=17)


def test_a_text_model_of_another_vocabulary(trained, tmp_path):
    workdir = pathlib.Path(shutil.copytree(trained.workdir, tmp_path / "copy"))
    workdirs.text_model_path(workdir).unlink()
    TextModel.train(["red blue green circle square"] * 3, 30, workdirs.text_model_path(workdir))
    ids = workdirs.load_text_model(workdir).vocab_size
    with pytest.raises(CheckpointError, match=str(ids)):
        TextToImage.load(str(workdir))
    config = trained.config.copy_and_resolve_references()
    config.steps = 4
    with pytest.raises(CheckpointError, match="embedding/text"):
        train_job.run(config, str(workdir))


def test_captions_of_a_job(tmp_path):
    config = config_files.load(f"{CONFIGS}/generate.py")
    with pytest.raises(DataError, match="prompts"):
        generate.read_captions(config)
    config.prompts = " a red circle | a star"
    assert generate.read_captions(config) == ["a red circle", "a star"]
    config.prompts_file = str(tmp_path / "captions.txt")
    with pytest.raises(DataError, match="prompts_file"):
        generate.read_captions(config)
    config.prompts = ""
    with pytest.raises(DataError, match="captions.txt"):
        generate.read_captions(config)
    (tmp_path / "captions.txt").write_text("\n")
    with pytest.raises(DataError, match="captions.txt"):
        generate.read_captions(config)
    (tmp_path / "captions.txt").write_text("a red circle\n\na star \n")
    assert generate.read_captions(config) == ["a red circle", "a star"]


@pytest.mark.parametrize("candidates", [0, 2])
def test_a_negative_caption_without_guidance_is_rejected(trained, model, tmp_path, candidates):
    for draw in (
        lambda: model.generate(CAPTION, negative="a green star"),
        lambda: model.generate_one([CAPTION], 1, 0, 0, negative="a green star"),
        lambda: model.complete(np.zeros((16, 16, 3), np.uint8), 2, CAPTION, negative="a green star"),
    ):
        with pytest.raises(ConfigError, match="guidance"):
            draw()
    config = config_files.load(f"{CONFIGS}/generate.py")
    config.update({"model_workdir": trained.workdir, "prompts": CAPTION, "candidates": candidates})
    config.negative = "a green star"
    with pytest.raises(ConfigError, match="guidance"):
        generate.run(config, str(tmp_path))
    assert not list(tmp_path.iterdir())


# -- parameters of a bfloat16 prior ---------------------------------------------------------------------------------


def test_loading_converts_the_parameters_of_a_bfloat16_prior(trained, model, monkeypatch):
    """The model holds half the bytes, draws the images of the float32 parameters and has the checkpoint's hash."""

    def half(*sections):
        prior = registry.make(*sections)
        trunk = dataclasses.replace(prior.options.trunk, dtype="bfloat16")
        return dataclasses.replace(prior, options=dataclasses.replace(prior.options, trunk=trunk))

    monkeypatch.setattr(loading, "make", half)
    loaded = TextToImage.load(trained.workdir, rows_at_once=2, mesh=model.mesh)
    held, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(each.params["trunk"])) for each in (loaded, model))
    assert whole / 2 < held < 0.6 * whole, "norms and biases stay float32"
    unconverted = dataclasses.replace(model, prior=loaded.prior)
    np.testing.assert_array_equal(loaded.generate(CAPTION, n=2), unconverted.generate(CAPTION, n=2))
    assert loaded.fingerprint() == model.fingerprint() == fingerprint(model.params) != fingerprint(loaded.params)


def test_weights_in_int8(trained, model, tmp_path):
    """The trunk's kernels have one byte per number, the hash is the checkpoint's, and a manifest remembers it."""
    loaded = TextToImage.load(trained.workdir, rows_at_once=2, mesh=model.mesh, weights="int8")
    held, whole = (sum(leaf.nbytes for leaf in jax.tree.leaves(each.params["trunk"])) for each in (loaded, model))
    assert whole / 4 < held < 0.4 * whole, "norms, biases and scales are float32"
    assert loaded.fingerprint() == model.fingerprint() and loaded.weights == "int8"
    with pytest.raises(ConfigError, match="int4"):
        TextToImage.load(trained.workdir, weights="int4")
    config = config_files.load(f"{CONFIGS}/generate.py")
    config.update({"model_workdir": trained.workdir, "prompts": CAPTION, "n": 2, "rows_at_once": 2, "weights": "int8"})
    config.mesh.data = 1
    generate.run(config, str(tmp_path))
    stored = np.asarray(Image.open(tmp_path / "0000-001.png"))
    np.testing.assert_array_equal(stored, loaded.generate(CAPTION, n=2)[1])
    np.testing.assert_array_equal(generate.remake(str(tmp_path / "manifest.json"), "0000-001.png"), stored)
    config.weights = "int4"
    with pytest.raises(ConfigError, match="int4"):
        generate.check(config, str(tmp_path))


# -- jobs ---------------------------------------------------------------------------------------------------------


def test_generate_one(model):
    captions = [CAPTION, "a green star"]
    images = model.generate(captions, n=3, seed=2)
    np.testing.assert_array_equal(model.generate_one(captions, 3, 1, 2, seed=2), images[1, 2])
    for i, j in ((2, 0), (-1, 0), (0, 3), (0, -1)):
        with pytest.raises(ConfigError, match=f"is {i if i in (2, -1) else j};"):
            model.generate_one(captions, 3, i, j, seed=2)


def test_every_image_of_a_manifest_can_be_drawn_again(trained, tmp_path):
    config = config_files.load(f"{CONFIGS}/generate.py")
    config.update(
        {"model_workdir": trained.workdir, "prompts": f"{CAPTION}|a green star|a small cross", "n": 3, "seed": 4}
    )
    config.update({"rows_at_once": 2, "sampling": {"temperature": 0.8, "top_k": 9, "guidance": 1.0}})
    config.mesh.data = 2
    generate.run(config, str(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert len(manifest["samples"]) == 9 and manifest["step"] == 3 and manifest["seed"] == 4
    assert manifest["mesh"] == {"data": 2, "fsdp": 1, "tensor": 1}
    assert manifest["samples"][4] == {
        "file": "0001-001.png", "caption": "a green star", "caption_index": 1, "index": 1,
    }  # fmt: skip
    assert (tmp_path / "grid.png").exists()
    for name in ("0000-000.png", "0001-002.png", "0002-001.png"):
        stored = np.asarray(Image.open(tmp_path / name))
        np.testing.assert_array_equal(generate.remake(str(tmp_path / "manifest.json"), name), stored)
    with pytest.raises(DataError, match="x.png"):
        generate.remake(str(tmp_path / "manifest.json"), "x.png")

    # A manifest of an earlier version, on one device; and one of more devices than this host has.
    for sizes in (None, {"data": 64, "fsdp": 1, "tensor": 1}):
        other = {**manifest, "mesh": sizes}
        if sizes is None:
            del other["mesh"], other["weights"]
        (tmp_path / "other.json").write_text(json.dumps(other))
        again = generate.remake(str(tmp_path / "other.json"), name)
        np.testing.assert_allclose(again.astype(int), stored.astype(int), rtol=0, atol=1)


def test_devices_get_equal_numbers_of_rows(model):
    shapes = lambda captions, n, devices, rows: [
        part.shape
        for part in drawing.chunks(
            dataclasses.replace(model, mesh=make_mesh(data=devices), rows_at_once=rows), captions, n
        )
    ]
    assert shapes(3, 4, 8, 64) == [(16, 1)] and shapes(1, 1, 8, 64) == [(8, 1)] and shapes(9, 3, 1, 64) == [(32, 1)]
    assert shapes(1, 100, 8, 64) == [(1, 64), (1, 64)] and shapes(1, 70, 8, 64) == [(1, 64), (8, 1)]
    assert shapes(4, 16, 1, 64) == [(4, 16)] and shapes(5, 16, 1, 64) == [(4, 16), (1, 16)]
    assert shapes(1, 10, 6, 64) == [(1, 18)] and shapes(1, 64, 6, 64) == [(1, 66)] and shapes(1, 4, 6, 64) == [(12, 1)]


def test_a_manifest_of_the_best_candidates(trained, model, tmp_path):
    """The same with a random CLIP that is frozen into a folder."""
    sizes = dict(image_size=16, patch=8, image_width=8, image_depth=1, image_heads=1, embed_dim=4)
    sizes |= dict(text_width=8, text_depth=1, text_heads=1, text_length=9, end_id=model.text_model.vocab_size)
    clip = CLIP(CLIPOptions(text_vocab=model.text_model.vocab_size + 1, **sizes))
    params = nn.meta.unbox(jax.jit(clip.init)(jax.random.key(0)))
    ClipScorer(clip, params, model.text_model).save(tmp_path)
    config = config_files.load(f"{CONFIGS}/generate.py")
    config.update({"model_workdir": trained.workdir, "prompts": f"{CAPTION}|a green star", "n": 2, "candidates": 5})
    config.update({"rows_at_once": 2, "clip": str(tmp_path)})
    config.mesh.data = 1
    generate.run(config, str(tmp_path))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["clip"] == str(tmp_path) and len(manifest["samples"]) == 4
    one = make_mesh(data=1)
    loaded = TextToImage.load(trained.workdir, rows_at_once=2, clip=str(tmp_path), mesh=one)
    ranked = loaded.best_of([CAPTION, "a green star"], 5, 2)
    for sample, score, number in zip(manifest["samples"], ranked.scores.ravel(), ranked.numbers.ravel()):
        assert sample["index"] == number and sample["score"] == pytest.approx(float(score))
        stored = np.asarray(Image.open(tmp_path / sample["file"]))
        np.testing.assert_array_equal(generate.remake(str(tmp_path / "manifest.json"), sample["file"]), stored)


@pytest.mark.slow
def test_evaluation_of_workdirs(trained, tmp_path):
    """The job, on one prior under two names and a CLIP."""
    text_model = workdirs.load_text_model(trained.workdir)
    sizes = dict(image_size=16, patch=8, image_width=8, image_depth=1, image_heads=1, text_width=8, text_depth=1)
    vocab = dict(text_heads=1, embed_dim=8, text_length=21, text_vocab=text_model.vocab_size + 1)
    clip = CLIP(CLIPOptions(**sizes, **vocab, end_id=text_model.vocab_size))
    ClipScorer(clip, nn.meta.unbox(clip.init(jax.random.key(0))), text_model).save(tmp_path)
    shutil.copytree(trained.workdir, tmp_path / "again")
    config = config_files.load(f"{CONFIGS}/evaluate.py")
    both = f"{trained.workdir}, {tmp_path / 'again'}"
    config.update({"model_workdir": both, "count": 5, "rows_at_once": 2, "clip": str(tmp_path)})
    config.metrics.update({"candidates": 2, "candidate_captions": 3})
    metrics = evaluate.run(config, str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    names = [trained.workdir, str(tmp_path / "again")]
    assert written.keys() == metrics.keys() == {"clip", "dvae", *names, "best_of", "blur", "protocol"}
    assert written[names[0]].keys() >= {"caption_accuracy", "image_nats_per_token", "fid_clip", "clip_score"}
    one, other = ({**written[name], "seconds_per_image": 0} for name in names)
    assert one == other and written["best_of"][names[0]] == written["best_of"][names[1]]
    assert written["protocol"]["checkpoints"][names[0]] == f"{trained.workdir}, step 3"
    assert written["protocol"]["captions"] == "5, first"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.html", "report.json", "grid.png", "blur.csv", "best_of.csv",
    }  # fmt: skip


def test_every_candidate_has_its_own_key():
    """Candidates of different captions differ too, and a key does not depend on the other rows."""
    text = np.int32([[1, 2, 3], [1, 2, 4]])
    bits = lambda *arguments: np.asarray(jax.random.key_data(row_keys(*arguments)))
    both = bits(0, text, np.int32([0, 1, 0, 1]))
    assert len(np.unique(both, axis=0)) == 4
    np.testing.assert_array_equal(bits(0, text[1:], np.int32([1])), both[3:])
    others = np.concatenate([both, bits(1, text, np.int32([0, 1, 0, 1])), bits(0, text, np.int32([0, 1, 0, 1]), 1)])
    assert len(np.unique(others, axis=0)) == 12


def test_the_best_checkpoint(trained, model, tmp_path):
    """`best` is the one with the lowest metric of the prior's task, which is not the latest here."""
    best = with_a_worse_checkpoint(trained.workdir, tmp_path / "prior", PriorTask.best_metric)
    chosen = TextToImage.load(str(tmp_path / "prior"), step="best")
    assert chosen.step == best == model.step
    jax.tree.map(np.testing.assert_array_equal, chosen.params, model.params)
    assert TextToImage.load(str(tmp_path / "prior")).step == best + 1
