"""Priors of classes and unconditional priors: from class folders, over a training that resumes, to images."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import untrained_run
from PIL import Image

from dalle_jax import TextToImage
from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.configuration import config_files
from dalle_jax.configuration.options import from_config
from dalle_jax.data.sources.decoding import decode_image
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.export.__main__ import main as export
from dalle_jax.jobs import evaluate, generate, train
from dalle_jax.priors.clip_condition import ClipEmbedding
from dalle_jax.priors.condition import Label, Nothing, Text

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
CLASSES = ["blue square", "n01440764", "red circle"]
SHORT = {
    "data.image_size": 16, "batch_size": 4, "eval_batches": 1, "mesh.data": 1, "cadence.log": 1, "cadence.eval": 2,
    "cadence.preview": 2, "cadence.checkpoint": 1,
    "schedules.learning_rate": {"kind": "constant", "value": 1e-2},
    "model.trunk.width": 16, "model.trunk.depth": 1, "model.trunk.heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders in ImageNet's layout: three classes in training, and a fourth one among the held-out images."""
    root = tmp_path_factory.mktemp("classes")
    for number, name in enumerate([f"train/{name}" for name in CLASSES] + [f"val/{CLASSES[0]}", "val/strange"]):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((16, 16, 3), 40 * number + i, np.uint8)).save(root / name / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return untrained_run.prior(tmp_path_factory.mktemp("tokenizer") / "run", "prior.py:shapes")


def configured(name, folder, tokenizer, **changes):
    config = config_files.load(f"{CONFIGS}/{name}")
    values = {**SHORT, "data.path": folder, "tokenizer_from": tokenizer, "steps": 3}
    config.update_from_flattened_dict(values | {key.replace("__", "."): value for key, value in changes.items()})
    return config


@pytest.fixture(scope="module")
def run(folder, tokenizer, tmp_path_factory):
    """The workdir of a prior of classes after three updates, and the final state."""
    workdir = str(tmp_path_factory.mktemp("run") / "run")
    return workdir, train.run(configured("prior.py:classes", folder, tokenizer), workdir)


def test_each_folder_is_a_class(run):
    workdir, state = run
    model = TextToImage.load(workdir)
    assert model.prior.layout.condition == Label(3)
    assert json.loads((pathlib.Path(workdir) / "text" / "labels.json").read_text())["names"] == CLASSES
    assert state.params["embedding"]["text"].shape == (4, 16), "three classes, and the dropped one"
    np.testing.assert_array_equal(model.generate("class: 1", n=2), model.generate("N01440764", n=2))
    assert (model.generate("red circle", n=4) != model.generate("blue square", n=4)).any()
    with pytest.raises(DataError, match="class: 2"):
        model.generate("a red circle")


def test_images_of_a_class_that_training_has_not_seen(run):
    """The three of them among six held-out images do not count."""
    data = json.loads((pathlib.Path(run[0]) / "data.json").read_text())
    assert data["splits"]["validation"]["examples"] == 6
    lines = [json.loads(line) for line in (pathlib.Path(run[0]) / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/image_nats" in line for line in lines)
    assert not any("text_nats" in key for line in lines for key in line), "a class is not predicted"


def test_a_training_resumes_bit_for_bit(run, folder, tokenizer, tmp_path):
    for steps in (1, 3):
        state = train.run(configured("prior.py:classes", folder, tokenizer, steps=steps), str(tmp_path / "run"))
    assert int(state.step) == 3
    jax.tree.map(np.testing.assert_array_equal, state.params, run[1].params)


def test_other_conditions_do_not_resume_it(run, folder, tokenizer):
    for condition in ("text", "none"):
        with pytest.raises(ConfigError, match="data.condition"):
            train.run(configured("prior.py:classes", folder, tokenizer, data__condition=condition), run[0])


def test_the_command_draws_and_measures_classes(run, tmp_path):
    config = config_files.load(f"{CONFIGS}/generate.py")
    config.model_workdir, config.prompts, config.n = run[0], "red circle|class: 0", 1
    generate.run(config, str(tmp_path / "images"))
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
    config = config_files.load(f"{CONFIGS}/evaluate.py")
    config.model_workdir, config.split, config.captions, config.count = run[0], "train", "first", 4
    assert evaluate.run(config, str(tmp_path / "report"))["autoregressive"]["image_nats_per_token"] > 0


def test_a_file_of_names(folder, tokenizer, tmp_path):
    """The order is that of the file, and a class may have several names."""
    names = tmp_path / "names.txt"
    names.write_text("n01440764, tench\nred circle\nblue square\ngreen cross\n")
    workdir = str(tmp_path / "run")
    changes = dict(text__path=str(names), steps=1)
    train.run(configured("maskgit.py:classes", folder, tokenizer, model__raster_steps=0, **changes), workdir)
    model = TextToImage.load(workdir)
    assert model.prior.layout.condition == Label(4)
    np.testing.assert_array_equal(model.generate("tench"), model.generate("class: 0"))


def test_too_many_classes(folder, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="text.vocab_size=3"):
        train.run(configured("prior.py:classes", folder, tokenizer, text__vocab_size=2), str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="bpe_dropout=0"):
        train.run(configured("prior.py:classes", folder, tokenizer, data__bpe_dropout=0.1), str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="label"):
        train.run(configured("prior.py:classes", folder, tokenizer, data__condition="clas"), str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="clip_noise"):
        train.run(configured("prior.py:classes", folder, tokenizer, clip_noise=0.4), str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["prior.py:small", "maskgit.py:small"])
def test_an_unconditional_prior(name, folder, tokenizer, tmp_path):
    """It needs no captions, and has no text model and no section `text`. Prompts only name the images."""
    changes = dict(data__condition="none", data__bpe_dropout=0.0, steps=2, data_tokens="once")
    changes |= dict(model__raster_steps=1) if name.startswith("maskgit") else {}
    workdir = str(tmp_path / "run")
    state = train.run(configured(name, folder, tokenizer, **changes), workdir)
    assert "text" not in state.params["embedding"] and not (tmp_path / "run" / "text").exists()
    stored = workdirs.read_config(workdir)
    assert "text" not in stored and stored["data"]["condition"] == "none" and stored["model"]["caption_drop"] == 0
    model = TextToImage.load(workdir)
    assert model.prior.layout.condition == Nothing() and model.text_model is None
    images = model.generate(["anything", "else"], n=2)
    np.testing.assert_array_equal(images[0], images[1])
    assert (images[0, 0] != images[0, 1]).any()
    config = config_files.load(f"{CONFIGS}/generate.py")
    config.model_workdir, config.prompts, config.n = workdir, "image", 2
    generate.run(config, str(tmp_path / "images"))
    image, other = (generate.remake(str(tmp_path / "images" / "manifest.json"), f"0000-{i:03}.png") for i in (0, 1))
    assert (image != other).any()
    assert export([f"--workdir={workdir}", f"--output={tmp_path / 'export'}"]) == 0
    np.testing.assert_array_equal(TextToImage.load(str(tmp_path / "export")).generate("image", n=2)[0], image)


@pytest.mark.parametrize("name", ["prior.py:clipgen", "maskgit.py:clipgen"])
def test_captions_without_captions(name, folder, tokenizer, tmp_path):
    """CLIP's embeddings of images train the prior, and its embeddings of captions draw. The workdir holds the CLIP."""
    clip = untrained_run.clip()
    clip.save(tmp_path / "clip")
    changes = dict(clip_from=str(tmp_path / "clip"), steps=2)
    changes |= dict(model__raster_steps=1) if name.startswith("maskgit") else {}
    workdir = str(tmp_path / "run")
    with pytest.raises(ConfigError, match="clip_from"):
        train.run(configured(name, folder, tokenizer, steps=2), workdir)
    state = train.run(configured(name, folder, tokenizer, **changes), workdir)
    assert state.params["embedding"]["clip_kernel"].shape == (8, 16)
    first, second = sorted(pathlib.Path(workdir).glob("conditions-*.npy"), key=lambda path: path.stat().st_size)
    source = open_source(from_config(DataOptions, workdirs.read_config(workdir)["data"], "data"), "train")
    images = np.stack([decode_image(source.record(i)) for i in range(len(source))])
    np.testing.assert_allclose(np.load(second), clip.image_features(images), atol=1e-5)
    assert len(np.load(first)) == 6 and len(images) == 9
    shutil.rmtree(tmp_path / "clip")
    model = TextToImage.load(workdir)
    assert model.prior.layout.condition == ClipEmbedding(8)
    np.testing.assert_allclose(model.encode_text(["a star"]), clip.text_features(["a star"]), atol=1e-6)
    assert (model.generate("a red circle", n=4) != model.generate("a green star", n=4)).any()


def test_earlier_runs_have_captions(tokenizer):
    """A stored configuration without the key is that of a prior of captions."""
    stored = workdirs.read_config(tokenizer)
    del stored["data"]["condition"]
    (pathlib.Path(tokenizer) / "config.json.sha256").unlink()
    (pathlib.Path(tokenizer) / "config.json").write_text(json.dumps(stored))
    assert isinstance(TextToImage.load(tokenizer).prior.layout.condition, Text)
