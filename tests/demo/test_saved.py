"""Saved images: an archive from which `remake` draws the same image again."""

import base64
import io
import json
import zipfile

import demo_runs
import numpy as np
import pytest
from PIL import Image

from dalle_jax.demo import saved
from dalle_jax.demo.__main__ import load
from dalle_jax.errors import ConfigError, DataError
from dalle_jax.jobs.generate import remake
from dalle_jax.reporting.images import png

CAPTION = "a red circle above a blue square"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return load(demo_runs.write(tmp_path_factory.mktemp("runs")), rows_at_once=8)


def drawn(studio, **given):
    request = {"caption": CAPTION, "n": 3, "seed": 5, "runs": ["maskgit"], "sampling": {"temperature": 0.8}, **given}
    done = next(event for event in studio.draw(request) if event["kind"] in ("images", "error"))
    return request, [url.partition(",")[2] for url in done["images"]], done


def unpacked(studio, folder, request, image, number):
    given = {"request": request, "number": number, "score": None, "image": image}
    zipfile.ZipFile(io.BytesIO(saved.archive(studio.models, given))).extractall(folder)
    return sorted(path.name for path in folder.iterdir())


def pixels(encoded):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))


@pytest.mark.parametrize(
    "edit",
    [
        {},
        {"method": "inpaint", "mask": {"height": 4, "width": 4, "bits": "c000"}},
        {"method": "outpaint", "pad": [0, 0, 1, 1]},
        {"method": "vary", "strength": 0.4},
        {"method": "complete", "rows": 2, "runs": ["prior"]},
    ],
    ids=lambda edit: edit.get("method", "generate"),
)
def test_a_saved_image_is_drawn_again(studio, tmp_path, edit):
    if edit:
        edit = {**edit, "image": drawn(studio)[1][0]}
    request, images, _ = drawn(studio, **edit)
    names = unpacked(studio, tmp_path, request, images[2], 2)
    assert names == sorted(
        ["0000-000.png", "manifest.json", *["input.png"] * bool(edit), *["mask.png"] * ("mask" in edit)]
    )
    assert "image" not in json.loads((tmp_path / "manifest.json").read_text())
    np.testing.assert_array_equal(remake(str(tmp_path / "manifest.json"), "0000-000.png"), pixels(images[2]))
    other = remake_number(tmp_path, 1)
    assert (other != pixels(images[2])).any()


def test_the_guidance_schedule_is_saved(studio, tmp_path):
    request, images, _ = drawn(studio, sampling={"guidance": 100.0, "guidance_schedule": "pow1000"})
    unpacked(studio, tmp_path, request, images[0], 0)
    assert json.loads((tmp_path / "manifest.json").read_text())["sampling"]["guidance_schedule"] == "pow1000"
    np.testing.assert_array_equal(remake(str(tmp_path / "manifest.json"), "0000-000.png"), pixels(images[0]))


def test_a_hosted_page_saves_no_path(tmp_path):
    runs = demo_runs.write(tmp_path / "private")
    hosted = load(runs[:1], rows_at_once=8, hosted=True)
    request, images, _ = drawn(hosted)
    given = {"request": request, "number": 0, "score": None, "image": images[0]}
    zipfile.ZipFile(io.BytesIO(saved.archive(hosted.models, given, hosted.places))).extractall(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    assert "private" not in text and json.loads(text)["workdir"] == "maskgit"
    again = remake(str(tmp_path / "manifest.json"), "0000-000.png", model_workdir=runs[0])
    np.testing.assert_array_equal(again, pixels(images[0]))


def remake_number(folder, number):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["samples"][0]["index"] = number
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return remake(str(folder / "manifest.json"), "0000-000.png")


@pytest.mark.parametrize(
    "changes, token",
    [({"number": 3}, "number"), ({"number": None}, "number"), ({"image": "!"}, "base64"), ({"score": "high"}, "score")],
)
def test_wrong_requests_are_rejected(studio, changes, token):
    request = {"caption": CAPTION, "n": 3, "runs": ["maskgit"]}
    image = base64.b64encode(png(np.zeros((16, 16, 3), np.uint8))).decode()
    with pytest.raises((ConfigError, DataError), match=token):
        saved.archive(studio.models, {"request": request, "number": 0, "image": image, **changes})


def test_a_damaged_edit_is_rejected(studio, tmp_path):
    image = drawn(studio)[1][0]
    request, images, _ = drawn(studio, method="vary", strength=0.4, image=image)
    unpacked(studio, tmp_path, request, images[0], 0)
    whole = json.loads((tmp_path / "manifest.json").read_text())
    for edit, token in [({"method": "load"}, "load"), ({"method": "vary"}, "strength")]:
        (tmp_path / "manifest.json").write_text(json.dumps({**whole, "edit": edit}))
        with pytest.raises(DataError, match=token):
            remake(str(tmp_path / "manifest.json"), "0000-000.png")
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    (tmp_path / "input.png").unlink()
    with pytest.raises(DataError, match="image file"):
        remake(str(tmp_path / "manifest.json"), "0000-000.png")
