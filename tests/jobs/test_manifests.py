"""Images of the generate job: whole, drawn again from anywhere, and nothing else in their folder is removed."""

import dataclasses
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from full_disk import fill_disk, needs_full_device
from PIL import Image
from random_model import text_to_image

from dalle_jax.configuration import config_files
from dalle_jax.errors import ConfigError, DataError, UserError
from dalle_jax.jobs import generate, manifests
from dalle_jax.storage.checksummed import checksum
from dalle_jax.text_to_image.text_to_image import TextToImage

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs" / "generate.py")
CAPTIONS = "a red circle|a green star"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return text_to_image(tmp_path_factory.mktemp("text"))


@pytest.fixture
def runs(tmp_path, model, monkeypatch):
    """Makes `tmp_path` the current folder, with the workdir `runs/prior` of the model, whose step 3 alone exists."""
    monkeypatch.chdir(tmp_path)
    workdir = tmp_path / "runs" / "prior"
    (workdir / "text").mkdir(parents=True)
    (workdir / "config.json").write_text('{"task": "prior", "data": {"image_size": 8}, "model": {}}')
    model.text_model.save(workdir / "text" / "sentencepiece.model")
    loaded = lambda folder, *_, **__: dataclasses.replace(model, workdir=str(folder), step=3)
    monkeypatch.setattr(TextToImage, "load", loaded)
    return tmp_path


def draw(out, **changes):
    config = config_files.load(CONFIG)
    config.update({"model_workdir": "runs/prior", "prompts": CAPTIONS, "n": 2, "rows_at_once": 2, **changes})
    config.mesh.data = 1
    generate.run(config, str(out))
    return json.loads((pathlib.Path(out) / "manifest.json").read_text())


def read_png(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_model_on_a_hub_is_found_by_its_address():
    assert manifests.workdir_of({"workdir": "hf://owner/name"}, "manifest.json") == "hf://owner/name"


def names(folder):
    return sorted(path.name for path in pathlib.Path(folder).iterdir())


# -- the model ----------------------------------------------------------------------------------------------------


def test_images_are_drawn_again_from_any_directory(runs, monkeypatch, model):
    manifest = draw("drawn")
    assert manifest["workdir"] == str(runs / "runs" / "prior") and manifest["workdir_from_here"] == "../runs/prior"
    assert manifest["fingerprints"].keys() == {"prior", "image_tokenizer", "text_model"} and manifest["clip"] is None
    stored = read_png("drawn/0001-001.png")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(generate.remake(f"{runs}/drawn/manifest.json", "0001-001.png"), stored)
    shutil.copytree(runs, moved := runs.parent / f"{runs.name}-moved")
    shutil.rmtree(runs)
    np.testing.assert_array_equal(generate.remake(f"{moved}/drawn/manifest.json", "0001-001.png"), stored)
    shutil.move(moved / "runs", moved / "elsewhere")
    with pytest.raises(DataError, match="model_workdir"):
        generate.remake(f"{moved}/drawn/manifest.json", "0001-001.png")
    again = generate.remake(f"{moved}/drawn/manifest.json", "0001-001.png", f"{moved}/elsewhere/prior")
    np.testing.assert_array_equal(again, stored)


@pytest.mark.parametrize("part", ["prior", "image_tokenizer", "text_model"])
def test_another_model_is_named(runs, monkeypatch, model, part):
    draw("drawn")
    field = {"prior": "params", "image_tokenizer": "tokenizer_params"}.get(part)
    if field:
        changed = jax.tree.map(lambda x: x + 1, getattr(model, field))
        other = dataclasses.replace(model, workdir="runs/prior", step=3, **{field: changed})
        monkeypatch.setattr(TextToImage, "load", lambda *_, **__: other)
    else:
        (runs / "runs" / "prior" / "text" / "sentencepiece.model").write_bytes(b"another")
    with pytest.raises(DataError, match=part.replace("_", " ")):
        generate.remake("drawn/manifest.json", "0000-000.png")


def test_the_clip_that_ranked_is_named(runs, model, monkeypatch):
    class Scorer:
        def score(self, images, captions):
            return np.arange(len(images), dtype=np.float32)

        def fingerprint(self):
            return "0123"

    load = TextToImage.load
    monkeypatch.setattr(TextToImage, "load", lambda *a, **k: dataclasses.replace(load(*a, **k), scorer=Scorer()))
    manifest = draw("own", candidates=3)
    assert manifest["clip"] == str(runs / "runs" / "prior") and manifest["fingerprints"]["clip"] == "0123"
    assert draw("given", candidates=3, clip="clips/a")["clip"] == str(runs / "clips" / "a")
    assert draw("unranked", clip="clips/a")["clip"] is None


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "null", "7", "{", "[" * 100_000, "\xff", {"samples": 3}, {"samples": [7]}, {"captions": [7]},
        {"mesh": {"data": -1}}, {"mesh": {"x": 1}}, {"mesh": {"data": "a"}}, {"workdir": 3}, {"step": [1]},
        {"samples": [{"file": "0000-000.png", "caption_index": "0", "index": 0}]}, {"fingerprints": None},
    ],
    ids=lambda content: str(content)[:30],
)  # fmt: skip
def test_damaged_manifests_are_named(runs, content):
    good = draw("drawn")
    text = json.dumps({**good, **content}) if isinstance(content, dict) else content
    pathlib.Path("drawn/manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="drawn/manifest.json"):
        generate.remake("drawn/manifest.json", "0000-000.png")
    assert draw("drawn")["samples"] == good["samples"], "the job writes over it"


def test_a_missing_manifest_is_named(runs):
    for path in ("nothing/manifest.json", "runs"):
        with pytest.raises(DataError, match=path):
            generate.remake(path, "0000-000.png")


# -- the files ----------------------------------------------------------------------------------------------------


def test_a_used_folder_loses_the_images_of_its_manifest(runs):
    draw("drawn")
    pathlib.Path("drawn/mine.png").touch()
    pathlib.Path("drawn/0001-001.png").write_bytes(b"painted over")
    assert len(draw("drawn", prompts="a red circle", n=1)["samples"]) == 1
    assert names("drawn") == ["0000-000.png", "0001-001.png", "grid.png", "manifest.json", "mine.png"]


@pytest.mark.parametrize("with_digests", [True, False])
@pytest.mark.parametrize("record", ["manifest.json", "manifest.unfinished.json"])
def test_a_stranger_cannot_remove_or_overwrite_files(runs, record, with_digests):
    """Not even with the right SHA-256: only in the folder itself, only by the names of images, and through no link."""
    out, content = runs / "drawn", b"precious"
    (out / "inside").mkdir(parents=True)
    outside = runs / "0007-000.png"
    kept = [outside, out / "holiday.png", out / "inside" / "0007-000.png", out / "0007-0.png", out / "٠٠٠٧-٠٠٠.png"]
    for path in kept:
        path.write_bytes(content)
    for link in ("0008-000.png", "0000-000.png", "grid.png"):
        (out / link).symlink_to(outside)
    listed = ["../0007-000.png", str(outside), "holiday.png", "inside/0007-000.png", "0008-000.png", "inside", "."]
    listed += ["0007-0.png", "٠٠٠٧-٠٠٠.png", "0007-000.png\n", "..", "", 7, None]
    digests = [(name, checksum(content)) for name in listed if isinstance(name, str)]
    if record == "manifest.json":
        stranger = {"samples": [{"file": name} for name in listed], "sha256": dict(digests) if with_digests else None}
    else:
        stranger = {"images": [*digests, [1], [[], {}], 7] if with_digests else listed}
    (out / record).write_text(json.dumps(stranger))
    draw("drawn", prompts="a red circle", n=1)
    assert all(path.read_bytes() == content for path in kept) and (out / "0008-000.png").is_symlink()
    assert read_png(out / "0000-000.png").shape == (16, 16, 3) and not (out / "0000-000.png").is_symlink()


@pytest.mark.parametrize("name", ["manifest.json", "manifest.unfinished.json", "0000-000.png"])
def test_a_pipe_does_not_hang(runs, name):
    (runs / "drawn").mkdir()
    os.mkfifo(runs / "drawn" / name)
    assert len(draw("drawn")["samples"]) == 4


@pytest.mark.parametrize("stop", ["0000-001.png", "grid.png", "manifest.json", "manifest.unfinished.json"])
def test_a_stopped_run_leaves_nothing_that_the_next_does_not_remove(runs, monkeypatch, stop):
    """Also when the stopped run has removed the images of a run before it, and when it is stopped twice."""
    from dalle_jax.storage import files

    write = files.write_atomically

    def stopped(path, content):
        if os.path.basename(path) == stop:
            raise KeyboardInterrupt
        write(path, content)

    draw("drawn", seed=1)
    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_atomically", stopped)
            with pytest.raises(KeyboardInterrupt):
                draw("drawn", prompts=f"{CAPTIONS}|a red square", n=3, seed=2)
        finished = stop == "manifest.unfinished.json"
        assert pathlib.Path("drawn/manifest.json").exists() == finished, "a manifest means that all images are there"
    draw("drawn", prompts="a red circle", n=1)
    assert names("drawn") == ["0000-000.png", "grid.png", "manifest.json"]


@needs_full_device
@pytest.mark.parametrize("name", ["0001-000.png", "grid.png", "manifest.json", "manifest.unfinished.json"])
def test_a_full_disk_is_one_line(runs, monkeypatch, name):
    fill_disk(monkeypatch, f"{name}.")
    with pytest.raises(UserError, match=rf"{name}.* bytes needed, [\d,]+ left") as raised:
        draw("drawn")
    assert raised.value.exit_code == 1 and "\n" not in str(raised.value)


def test_a_folder_in_place_of_an_image_is_kept(runs):
    (runs / "drawn" / "0001-000.png").mkdir(parents=True)
    (runs / "drawn" / "0001-000.png" / "mine.txt").write_text("mine")
    draw("drawn")
    assert (runs / "drawn" / "0001-000.png").is_file()
    assert (runs / "drawn" / "0001-000.png.damaged" / "mine.txt").read_text() == "mine"


def test_a_workdir_that_is_a_file_is_found_before_anything_is_drawn(runs, monkeypatch):
    (runs / "file").write_text("mine")
    monkeypatch.setattr(TextToImage, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match="file"):
        draw("file")
