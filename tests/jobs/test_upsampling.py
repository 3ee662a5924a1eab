"""A prior that enlarges images: from a folder, over a training that resumes, to images, manifests and exports."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import untrained_run
import upsampling
from flax import linen as nn
from ml_collections import ConfigDict
from PIL import Image

from dalle_jax import TextToImage
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration import config_files
from dalle_jax.data.augment import augment
from dalle_jax.errors import CheckpointError, ConfigError, DataError
from dalle_jax.export.__main__ import main as export
from dalle_jax.jobs import evaluate, generate, train
from dalle_jax.priors.low_resolution import LowResolution
from dalle_jax.tasks import prior

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
SHORT = {
    "data.image_size": 32, "batch_size": 4, "eval_batches": 1, "mesh.data": 1, "cadence.log": 1, "cadence.eval": 2,
    "cadence.preview": 2, "cadence.checkpoint": 1, "low_size": 16, "model.raster_steps": 0, "model.encoder_depth": 1,
    "schedules.learning_rate": {"kind": "constant", "value": 1e-2},
    "model.trunk.width": 16, "model.trunk.depth": 1, "model.trunk.heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"drawing {'abcdefgh'[i]}\n")
    return str(root)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The workdir of a prior that draws the small images, and whose tokenizer encodes both sizes."""
    return untrained_run.prior(tmp_path_factory.mktemp("small") / "run", "prior.py:shapes")


def configured(folder, small, **changes):
    config = config_files.load(f"{CONFIGS}/maskgit.py:upsample")
    values = {**SHORT, "data.path": folder, "tokenizer_from": small, "low_from": small, "steps": 2}
    config.update_from_flattened_dict(values | {key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def run(folder, small, tmp_path_factory):
    workdir = str(tmp_path_factory.mktemp("run") / "run")
    return workdir, train.run(configured(folder, small), workdir)


@pytest.fixture(scope="module")
def model(run):
    return TextToImage.load(run[0])


def images_of(folder):
    return [np.asarray(Image.open(path)) for path in sorted(pathlib.Path(folder).glob("*.png"))]


def half(pixels):
    return augment(pixels, 16, "none", None)


def test_the_condition_is_a_caption_and_the_tokens_of_a_smaller_copy(run, model, folder, small):
    condition = model.prior.layout.condition
    assert isinstance(condition, LowResolution) and model.text_model.size == 16
    stored = [np.load(path) for path in pathlib.Path(run[0]).glob("conditions-*.npy")]
    tokenizer, params = workdirs.load_tokenizer(small)
    halves = np.stack([half(image) for image in images_of(folder)])
    expected = np.asarray(tokenizer.encode(params, halves)).reshape(8, -1)
    found = np.concatenate([rows[:, condition.text.length :] for rows in stored])
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
    row = condition.with_captions(condition.of_images(halves[:1], model.text_model), ["drawing a"], model.text_model)
    assert condition.decode(row[0], model.text_model) == "drawing a"


def test_codes_of_smaller_images_start_from_their_codebook(run, small):
    """Their embeddings have the angles of the codebook's vectors, if `codebook_init` is set."""
    tokenizer, params = workdirs.load_tokenizer(small)
    config = ConfigDict(workdirs.read_config(run[0]))
    angles = lambda x: np.corrcoef((x - x.mean(0)) @ (x - x.mean(0)).T)
    expected = angles(np.asarray(tokenizer.codebook(params), np.float64))
    for chosen in (True, False):
        config.model.codebook_init = chosen
        task = prior.build(config, run[0]).task
        table = nn.meta.unbox(jax.jit(task.init)(jax.random.key(0)))["embedding"]["low_resolution"]
        alike = np.allclose(angles(np.asarray(table[:-1], np.float64)), expected, atol=1e-2)
        assert table.shape == (25, 16) and alike == chosen


def test_cells_have_the_positions_of_the_image(model):
    """The position of a cell of a smaller image follows from the tables of rows and columns alone."""
    tables = model.params["embedding"]
    assert tables["text_positions"].shape == (8, 16), "those of the caption"
    bound = lambda params: model.prior.model.apply(
        {"params": params}, method=lambda m: m.embedding._positions_of_condition()
    )
    before = bound(model.params)
    rows = np.asarray(tables["rows"]).copy()
    rows[:2] += 1.0  # the upper quarter of the image is the first of four rows of cells
    moved = np.asarray(bound(model.params | {"embedding": tables | {"rows": rows}}) - before).mean(-1)
    assert before.shape == (24, 16) and (moved[:8] == 0).all()
    assert (moved[8:12] > 0.7).all() and (np.abs(moved[16:]) < 1e-6).all()


def test_a_training_resumes_bit_for_bit(run, folder, small, tmp_path):
    for steps in (1, 2):
        state = train.run(configured(folder, small, steps=steps), str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, state.params, run[1].params)


def test_upsample(model, folder):
    """An image depends on its own pixels, caption and seed, and not on the others of the call."""
    images = images_of(folder)[:3]
    large = model.upsample(images, ["drawing a", "drawing b", "drawing c"])
    assert large.shape == (3, 32, 32, 3) and large.dtype == np.uint8
    np.testing.assert_array_equal(model.upsample(images[1], "drawing b")[0], large[1])
    for other in (dict(images=images[2]), dict(captions="drawing c"), dict(captions=None), dict(seed=1)):
        changed = model.upsample(**{"images": images[1], "captions": "drawing b", **other})[0]
        assert (changed != large[1]).any(), other
    halves = [half(image) for image in images]
    np.testing.assert_array_equal(model.upsample(halves, ["drawing a", "drawing b", "drawing c"]), large)
    (pil,) = model.upsample(images[0], "drawing a", output="pil")
    np.testing.assert_array_equal(np.asarray(pil), large[0])


def test_refused_calls(model, small, folder, tmp_path):
    image = images_of(folder)[0]
    with pytest.raises(DataError, match="upsample"):
        model.generate("drawing a")
    with pytest.raises(DataError, match="2 captions"):
        model.upsample(image, ["drawing a", "drawing b"])
    with pytest.raises(ConfigError, match="negative"):
        model.upsample(image, "drawing a", negative="drawing b", guidance=1.0)
    with pytest.raises(ConfigError, match="maskgit.py:upsample"):
        TextToImage.load(small).upsample(image)
    config = config_files.load(f"{CONFIGS}/generate.py")
    config.model_workdir, config.upsampler, config.prompts = small, small, "a red circle"
    with pytest.raises(ConfigError, match="config.upsampler="):
        generate.run(config, str(tmp_path / "images"))
    config.upsampler, config.upsampler_sampling.steps = None, 2
    with pytest.raises(ConfigError, match="upsampler_sampling"):
        generate.run(config, str(tmp_path / "images"))
    config = config_files.load(f"{CONFIGS}/evaluate.py")
    config.model_workdir, config.count, config.split = model.workdir, 4, "train"
    with pytest.raises(ConfigError, match="upsampler"):
        evaluate.run(config, str(tmp_path / "report"))


@pytest.mark.parametrize(
    "changes, token",
    [
        (dict(low_from=None), "low_from"),
        (dict(low_from="nowhere"), "nowhere"),
        (dict(low_size=15), "low_size"),
        (dict(low_size=64), "low_size"),
        (dict(data__augment="prior", data_tokens="each_batch"), "augment"),
        (dict(data__condition="text"), "low_from"),
        (dict(clip_noise=0.4), "clip_noise"),
    ],
    ids=str,
)
def test_refused_configurations(changes, token, folder, small, tmp_path):
    with pytest.raises((ConfigError, CheckpointError), match=token):
        train.run(configured(folder, small, **changes), str(tmp_path / "run"))


def test_the_command_enlarges_and_its_manifest_draws_again(run, model, small, tmp_path):
    captions = ["a red circle", "drawing b"]
    config = config_files.load(f"{CONFIGS}/generate.py")
    config.model_workdir, config.upsampler, config.prompts, config.n = small, run[0], "|".join(captions), 2
    config.seed, config.upsampler_sampling.temperature, config.upsampler_sampling.steps = 3, 0.5, 2
    generate.run(config, str(tmp_path / "images"))
    manifest = tmp_path / "images" / "manifest.json"
    drawn = TextToImage.load(small).generate(captions, n=2, seed=3)
    for i, caption in enumerate(captions):
        expected = model.upsample(drawn[i], caption, seed=3, temperature=0.5, steps=2)
        assert (expected != model.upsample(drawn[i], caption, seed=3)).any()
        for j in range(2):
            file = f"{i:04}-{j:03}.png"
            np.testing.assert_array_equal(np.asarray(Image.open(manifest.parent / file)), expected[j])
            np.testing.assert_array_equal(generate.remake(str(manifest), file), expected[j])
    record = json.loads(manifest.read_text())
    changed = {"fingerprints": {"prior": "0" * 16}, "sampling": [], "workdir": None, "step": 0.5}
    for field, value in changed.items():
        manifest.write_text(json.dumps(record | {"upsampler": record["upsampler"] | {field: value}}))
        with pytest.raises(DataError, match="not the model" if field == "fingerprints" else "'upsampler'"):
            generate.remake(str(manifest), "0000-000.png")
    del record["upsampler"]["sampling"]  # an earlier version wrote it
    manifest.write_text(json.dumps(record))
    assert generate.remake(str(manifest), "0000-000.png").shape == (32, 32, 3)


def test_an_export_enlarges_alike(run, model, folder, tmp_path):
    assert export([f"--workdir={run[0]}", f"--output={tmp_path / 'export'}"]) == 0
    image = images_of(folder)[0]
    exported = TextToImage.load(str(tmp_path / "export"))
    np.testing.assert_array_equal(exported.upsample(image, "drawing a"), model.upsample(image, "drawing a"))
    shutil.rmtree(tmp_path / "export" / "low_resolution")
    with pytest.raises(CheckpointError):
        TextToImage.load(str(tmp_path / "export"))


def test_the_experiment_measures_each_way(run, tmp_path, capsys):
    """The reconstruction of the tokenizer is another image than the real one, and all ways have all metrics."""
    upsampling.main([f"--workdir={run[0]}", f"--output={tmp_path}", "--count=1"])
    found = json.loads((tmp_path / "upsampling.json").read_text())
    assert found.pop("images") == 1 and found.pop("temperature") == 1.0
    assert set(found) == {"16 pixels", "bicubic", "prior", "prior, no caption", "tokenizer"}
    assert all(set(row) == {"psnr", "ssim"} and row["psnr"] < 60 for row in found.values())
    assert found["bicubic"] != found["16 pixels"] and "bicubic.psnr" in capsys.readouterr().out
    assert np.asarray(Image.open(tmp_path / "upsampling.png")).std() > 0
