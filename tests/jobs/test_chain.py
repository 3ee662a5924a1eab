"""A prior's tokenizer follows the prior: its data, its place, and the sizes of both."""

import json
import pathlib

import pytest
from own_images import Trained, make_folder, make_shards

from dalle_jax.errors import ConfigError
from dalle_jax.jobs import train as train_job
from dalle_jax.jobs.preparation import prepare
from dalle_jax.storage import checksummed


def run(config, trained, workdir=None):
    """Runs the job; returns the configuration and workdir of the training that begins."""
    with pytest.raises(Trained):
        train_job.run(config, workdir or config.workdir)
    return trained[-1]


def stored(workdir):
    return json.loads((pathlib.Path(workdir) / "config.json").read_text())


def write(workdir, config):
    pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
    checksummed.write_json(pathlib.Path(workdir) / "config.json", config)


# -- data ----------------------------------------------------------------------------------------------------------


def test_one_path_is_enough(load, trained, folder):
    config, workdir = run(load("prior.py:small"), trained)
    assert (config.task, config.data.path, config.data.source) == ("vq", folder, "folder")
    assert workdir == "runs/dvae-small"
    other = make_folder(pathlib.Path("other"))
    assert run(load("prior.py:small", tokenizer__data__path=other), trained)[0].data.path == other


@pytest.mark.parametrize("variant", ["small", "folder"])
def test_tar_shards_need_one_path_too(load, trained, variant, tmp_path, monkeypatch):
    shards = make_shards(tmp_path / "shards")
    changes = {} if variant == "small" else {"data__source": "tar_shards"}
    config = load(f"prior.py:{variant}", data__path=shards, data__data_dir=str(tmp_path / "data"), **changes)
    prepared = prepare(config)
    assert prepared.data.source == prepared.tokenizer.data.source == "tar_shards"


@pytest.mark.parametrize("variant", ["shapes", "emoji"])
def test_arguments_of_another_builder_are_dropped(load, variant, tmp_path):
    """`shapes` and `emoji` set arguments of their builders, which shards do not have."""
    shards = make_shards(tmp_path / "shards")
    prepared = prepare(load(f"prior.py:{variant}", data__source="tar_shards", data__path=shards))
    for data in (prepared.data, prepared.tokenizer.data):
        assert data.source == "tar_shards" and data.builder_kwargs.to_dict() == {}
    kept = prepare(load(f"prior.py:{variant}"))
    assert (
        kept.data.builder_kwargs and kept.tokenizer.data.builder_kwargs.to_dict() == kept.data.builder_kwargs.to_dict()
    )


@pytest.mark.parametrize(
    "name, variant", [("prior", "shapes"), ("maskgit", "emoji"), ("clip", "emoji"), ("dvae", "shapes")]
)
def test_a_path_for_a_source_that_draws_its_images(load, trained, folder, name, variant):
    command = rf"configs/{name}.py:small --config.data.path={folder}"
    with pytest.raises(ConfigError, match=command):
        train_job.run(load(f"{name}.py:{variant}", data__path=folder), "run")
    assert not trained


def test_the_kind_of_data_is_named(load, trained, folder, tmp_path):
    shards = make_shards(tmp_path / "shards")
    with pytest.raises(ConfigError, match="data.source=tar_shards"):
        train_job.run(load("prior.py:folder", data__path=shards), "run")
    with pytest.raises(ConfigError, match="data.source=folder"):
        train_job.run(load("prior.py:small", data__source="tar_shards"), "run")
    assert not trained


@pytest.mark.parametrize("key, value", [("image_size", 64), ("source", "tar_shards")])
def test_contradictions(load, trained, key, value):
    with pytest.raises(ConfigError, match=f"tokenizer.data.{key}"):
        train_job.run(load("prior.py:small", **{f"tokenizer__data__{key}": value}), "run")
    assert not trained


@pytest.mark.parametrize("name", ["prior", "maskgit"])
def test_64_pixels(load, trained, name):
    config, _ = run(load(f"{name}.py:small", data__image_size=64), trained)
    assert config.data.image_size == 64


# -- the place of the tokenizer ------------------------------------------------------------------------------------


def test_another_folder_never_gets_a_tokenizer_silently(load, trained, pretend):
    first, place = run(load("prior.py:small"), trained, "runs/a")
    write(place, first.to_dict())
    pretend[place] = 4000
    other = make_folder(pathlib.Path("other"), 30)
    config, elsewhere = run(load("prior.py:small", data__path=other), trained, "runs/b")
    assert elsewhere.startswith("runs/dvae-small-") and config.data.path == other
    write(elsewhere, config.to_dict())
    assert run(load("prior.py:small", data__path=other), trained, "runs/b")[1] == elsewhere, "it resumes there"
    changed = load("prior.py:small", tokenizer__model__vocab_size=32)
    assert run(changed, trained, "runs/c")[1] not in (place, elsewhere), "another model"
    with pytest.raises(ConfigError, match=r"tokenizer_from=mine"):
        write("mine", first.to_dict())
        train_job.run(load("prior.py:small", data__path=other, tokenizer__workdir="mine"), "runs/d")


def test_a_trained_tokenizer_of_the_same_data_is_used(load, trained, pretend, monkeypatch):
    first, place = run(load("prior.py:small"), trained, "runs/a")
    write(place, first.to_dict())
    pretend[place] = first.steps
    loaded = []

    def load_tokenizer(source, _):
        loaded.append(source)
        raise Trained

    monkeypatch.setattr("dalle_jax.checkpoints.workdir.load_tokenizer", load_tokenizer)
    del trained[:]
    for name in ("prior", "maskgit"):
        with pytest.raises(Trained):
            train_job.run(load(f"{name}.py:small"), f"runs/{name}")
    assert loaded == [place, place] and not trained


def test_shapes_share_one_tokenizer(load, trained):
    """The default workdir stays, with and without a tokenizer in it, and for both priors."""
    config = load("dvae.py:shapes")
    write("runs/dvae-shapes", config.to_dict())
    for name in ("prior", "maskgit"):
        assert run(load(f"{name}.py:shapes"), trained, f"runs/{name}")[1] == "runs/dvae-shapes"


def test_a_workdir_belongs_to_its_data(load, trained, pretend, folder):
    config, _ = run(load("clip.py:small"), trained)
    pretend["runs/clip-small"] = 10
    other = make_folder(pathlib.Path("other"))
    with pytest.raises(ConfigError, match=r"data.path.*--workdir=runs/clip-small-2"):
        train_job.run(load("clip.py:small", data__path=other), "runs/clip-small")
    again, _ = run(load("clip.py:small"), trained)
    assert again.data.path == config.data.path
    with pytest.raises(ConfigError, match="task"):
        train_job.run(load("dvae.py:small"), "runs/clip-small")
    moved = stored("runs/clip-small")
    moved["data"]["path"] = "/no/such/folder"
    write("runs/clip-small", moved)
    assert run(load("clip.py:small"), trained)[0].data.path == folder, "the folder was moved"


def test_a_run_that_has_not_begun_may_change_its_data(load, trained, pretend):
    run(load("clip.py:small"), trained)
    other = make_folder(pathlib.Path("other"))
    assert run(load("clip.py:small", data__path=other), trained)[0].data.path == other
    assert stored("runs/clip-small")["data"]["path"] == other


# -- sizes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prior", "maskgit", "clip", "dvae"])
def test_sizes_follow_the_data_and_stay(load, trained, name, pretend):
    config = load(f"{name}.py:small")
    run(config, trained)
    workdir = config.workdir
    sizes = stored(workdir)
    assert sizes["steps"] == config.from_data.min_steps
    assert sizes["schedules"]["learning_rate"]["steps"] == sizes["steps"]
    assert sizes["cadence"]["preview"] == (sizes["steps"] + 3) // 4
    if name != "dvae":
        assert sizes["text"]["vocab_size"] == 64 and 8 <= sizes["text"]["length"] <= 24
    if "tokenizer" in config:
        assert sizes["tokenizer"]["steps"] == config.tokenizer.from_data.min_steps
        assert trained[-1][0].steps == sizes["tokenizer"]["steps"]
    # A resumed run takes them from there, also if the rules would give other ones now.
    pretend[workdir] = 10
    run(load(f"{name}.py:small", from_data__min_steps=9000, from_data__max_steps=9000), trained)
    assert stored(workdir)["steps"] == sizes["steps"]
    if "tokenizer" not in config:
        assert trained[-1][0].steps == sizes["steps"]


def test_a_size_that_is_set_wins(load, trained, caplog):
    run(load("clip.py:small", steps=77, text__length=9), trained)
    config = trained[-1][0]
    assert (config.steps, config.text.length, config.schedules.learning_rate.steps) == (77, 9, 77)
    assert config.text.vocab_size == 64, "from the captions"


def test_the_sizes_are_one_line_in_the_log(load, trained, monkeypatch):
    lines = []
    monkeypatch.setattr("absl.logging.info", lambda text, *values: lines.append(text % values))
    run(load("clip.py:small"), trained)
    (line,) = [line for line in lines if "text.vocab_size=64" in line]
    assert "steps=150" in line and "text.length=" in line and " examples" in line
