"""The events of a drawing: as the library draws, one run after the other, and stopped when nobody reads."""

import base64
import dataclasses
import io
import json
import time
from pathlib import Path

import demo_runs
import numpy as np
import pytest
import untrained_run
from PIL import Image

from dalle_jax.demo.__main__ import load, names_of
from dalle_jax.demo.studio import Studio
from dalle_jax.text_to_image import drawing

CAPTION = "a red circle above a blue square"


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    loaded = load(demo_runs.write(tmp_path_factory.mktemp("runs")))
    with_clip = {name: dataclasses.replace(model, scorer=untrained_run.clip()) for name, model in loaded.models.items()}
    return Studio(with_clip)


def pixels(url):
    content = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(content)))


def events(studio, **given):
    request = {"caption": CAPTION, "n": 2, "seed": 3, "runs": ["maskgit", "prior"], **given}
    return list(studio.draw(request))


def of(found, kind, run=None):
    return [event for event in found if event["kind"] == kind and (run is None or event["run"] == run)]


def test_the_description(studio):
    about = studio.describe()
    assert [run["name"] for run in about["runs"]] == ["maskgit", "prior"]
    assert about["captions"] == ["a red circle above a blue square"]
    assert [run["edits"] for run in about["runs"]] == [["complete", "inpaint", "outpaint", "vary"], ["complete"]]
    assert all(run["clip"] and run["size"] == 16 and run["grid"] == [4, 4] for run in about["runs"])
    assert about["candidates"] == 16, "a new page shows the best ones"
    without = [dataclasses.replace(model, scorer=None) for model in studio.models.values()]
    assert Studio(dict(zip(studio.models, without))).describe()["candidates"] == 0


def test_both_runs_draw_what_the_library_draws(studio):
    found = events(studio, sampling={"temperature": 0.7, "steps": 3})
    assert [event["kind"] for event in found if event["kind"] in ("run", "images", "end")] == [
        "run", "images", "run", "images", "end",
    ]  # fmt: skip
    for name, model in studio.models.items():
        steps = {"steps": 3} if name == "maskgit" else {}
        expected = model.generate(CAPTION, n=2, seed=3, temperature=0.7, **steps)
        (done,) = of(found, "images", name)
        np.testing.assert_array_equal([pixels(url) for url in done["images"]], expected)
        assert done["steps"] == (3 if steps else 16) and done["drawn"] == 2 and done["scores"] is None
        frames = of(found, "frame", name)
        assert [frame["progress"] for frame in frames] == ([1 / 3, 2 / 3] if steps else [1 / 4, 2 / 4, 3 / 4])
        assert all(len(frame["images"]) == 2 for frame in frames)


def test_the_compilation_is_noted(studio):
    drawing._announce.cache_clear()
    found = events(studio, runs=["maskgit"])
    (note,) = of(found, "note")
    assert "Compiling once" in note["text"] and of(found, "images")[0]["compiled"]
    found = events(studio, runs=["maskgit"])
    assert not of(found, "note") and not of(found, "images")[0]["compiled"]


def test_candidates(studio):
    model = studio.models["maskgit"]
    (done,) = of(events(studio, candidates=6, runs=["maskgit"]), "images")
    ranked = model.best_of(CAPTION, 6, 2, 3)
    np.testing.assert_array_equal([pixels(url) for url in done["images"]], ranked.images[0])
    assert done["numbers"] == ranked.numbers[0].tolist() and done["drawn"] == 6
    np.testing.assert_allclose(done["scores"], ranked.scores[0], atol=1e-3)


def edit(studio, **changes):
    image = of(events(studio, runs=["maskgit"]), "images")[0]["images"][0]
    return pixels(image), {"image": image.partition(",")[2], "runs": ["maskgit"], **changes}


def test_edits(studio):
    model = studio.models["maskgit"]
    image, given = edit(studio)
    left = np.zeros((16, 16), bool)
    left[:, :4] = True
    draw = lambda **changes: [pixels(u) for u in of(events(studio, **given, **changes), "images")[0]["images"]]
    cells = {"height": 4, "width": 4, "bits": "8888"}
    np.testing.assert_array_equal(draw(method="inpaint", mask=cells), model.inpaint(image, left, CAPTION, n=2, seed=3))
    np.testing.assert_array_equal(
        draw(method="outpaint", pad=[0, 1, 2, 0]), model.outpaint(image, (0, 4, 8, 0), CAPTION, n=2, seed=3)
    )
    np.testing.assert_array_equal(draw(method="vary", strength=0.5), model.vary(image, 0.5, CAPTION, n=2, seed=3))
    np.testing.assert_array_equal(draw(method="vary", strength=0.5, caption=" "), model.vary(image, 0.5, n=2, seed=3))
    np.testing.assert_array_equal(draw(method="complete", rows=1), model.complete(image, 1, CAPTION, n=2, seed=3))


def test_candidates_of_an_edit_are_ranked(studio):
    image, given = edit(studio, method="vary", strength=0.5, candidates=5)
    (done,) = of(events(studio, **given), "images")
    model = studio.models["maskgit"]
    images = model.vary(image, 0.5, CAPTION, n=5, seed=3)
    scores = model.scorer.score(images, CAPTION)
    best = np.argsort(-scores, kind="stable")[:2]
    assert done["numbers"] == best.tolist()
    np.testing.assert_array_equal([pixels(url) for url in done["images"]], images[best])


@pytest.mark.parametrize(
    "changes, token",
    [
        ({"caption": " "}, "empty"),
        ({"seed": -1}, "seed"),
        ({"negative": "a square"}, "guidance"),
        ({"sampling": {"temperature": -1}}, "temperature"),
        ({"sampling": {"steps": 99}}, "steps"),
        ({"sampling": {"guidance": 1, "guidance_schedule": "quadratic"}}, "'quadratic'; expected one of constant"),
        ({"sampling": {"guidance_schedule": "linear"}}, "guidance is 0"),
        ({"candidates": 1}, "candidates"),
    ],
)
def test_the_errors_are_those_of_the_library(studio, changes, token):
    found = events(studio, runs=["maskgit"], **changes)
    (error,) = of(found, "error", "maskgit")
    assert token in error["text"] and found[-1]["kind"] == "end"


def test_an_error_of_one_run_does_not_stop_the_other(studio):
    image, given = edit(studio)
    found = events(studio, **given | {"runs": ["prior", "maskgit"]}, method="vary", strength=0.5)
    (error,) = of(found, "error")
    assert error["run"] == "prior" and "complete()" in error["text"]
    assert ". prior holds the" in error["text"], "the run's name, not its path"
    assert of(found, "images")[0]["run"] == "maskgit"


def test_a_wrong_request_is_one_error(studio):
    found = list(studio.draw({"caption": CAPTION, "runs": ["maskgit"], "n": 1000}))
    assert [event["kind"] for event in found] == ["error", "end"] and found[0]["run"] is None


def test_a_fault_of_ours_shows_no_details(studio, monkeypatch):
    broken = Studio({"maskgit": dataclasses.replace(studio.models["maskgit"], params={})})
    (error,) = of(events(broken, runs=["maskgit"]), "error")
    assert "see the log" in error["text"]


def test_a_visitor_who_leaves_stops_the_drawing(studio, monkeypatch):
    seen, decode = [], drawing.decode_partly

    def slow(*given):
        seen.append(given)
        time.sleep(0.05)
        return decode(*given)

    monkeypatch.setattr(drawing, "decode_partly", slow)
    reading = studio.draw({"caption": CAPTION, "runs": ["maskgit", "prior"], "n": 2, "sampling": {"steps": 16}})
    while next(reading)["kind"] != "frame":
        pass
    reading.close()
    before = len(seen)
    time.sleep(1.0)
    assert len(seen) <= before + 1  # the piece that was being drawn


def test_the_guidance_schedule_reaches_the_library(studio):
    images = {}
    for schedule in (None, "linear", "pow1000"):
        sampling = {"guidance": 100.0, "guidance_schedule": schedule, "steps": 4}
        (done,) = of(events(studio, runs=["maskgit"], sampling=sampling), "images")
        images[schedule] = done["images"]
    assert images[None] == images["linear"] != images["pow1000"], "MaskGIT's default is linear"


def test_an_export_has_the_captions_of_its_data_set(studio, tmp_path):
    """It holds no captions of its training. Those of other data sets are private."""
    model = dataclasses.replace(studio.models["maskgit"], workdir=str(tmp_path))
    config = json.loads((Path(studio.models["maskgit"].workdir) / "config.json").read_text())
    for source, found in (("shapes_captions", 4), ("folder", 0)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "data": {**config["data"], "source": source}}))
        assert len(Studio({"shapes": model}).describe()["captions"]) == found


def test_messages_name_a_run_without_its_path(studio):
    model = studio.models["maskgit"]
    named = lambda workdir: Studio({"best": dataclasses.replace(model, workdir=workdir)})
    there = named("runs/a")
    assert there.public(f"{Path.cwd()}/runs/a holds no CLIP, nor does runs/a.") == "best holds no CLIP, nor does best."
    assert there.public("other/runs/a, runs/ab") == "other/runs/a, runs/ab"
    assert named(".").public("n is 1. m is 0.5.") == "n is 1. m is 0.5."


def test_names_tell_runs_apart():
    assert names_of(["runs/a/prior", "runs/a/maskgit/"]) == ["prior", "maskgit"]
    assert names_of(["runs/a/prior", "runs/b/prior"]) == ["a/prior", "b/prior"]
    assert names_of(["prior", "prior"]) == ["prior (1)", "prior (2)"]
    assert names_of(["hf://owner/name", "/"]) == ["name", "/"]
    assert names_of(["/srv/a/prior", "/srv/b/prior"], hosted=True) == ["prior (1)", "prior (2)"]
