"""Metrics of an evaluation against values computed by hand, with random weights and images of noise."""

import csv
import dataclasses
import html
import json

import jax
import numpy as np
import pytest
import yaml
from flax import traverse_util
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder
from PIL import Image
from small_evaluation import COUNT, OPTIONS, SAMPLING, N, make_model, open_tests, write_images

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.sharding import replicated
from dalle_jax.errors import ConfigError
from dalle_jax.evaluation.measure import Model, measure
from dalle_jax.evaluation.report import write
from dalle_jax.metrics import codebook, frechet, shapes
from dalle_jax.metrics.retrieval import retrieval
from dalle_jax.text_to_image.text_to_image import TextToImage


@pytest.fixture(scope="module")
def tests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    return open_tests(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def measured(model, tests):
    return measure({"maskgit": Model(model, SAMPLING)}, tests, OPTIONS)


def test_devices_share_the_work(measured, model, tests):
    """Batches are split over two devices, the last one half empty. The metrics are the same."""
    mesh = make_mesh(data=2)
    put = lambda tree: jax.device_put(tree, replicated(mesh))
    scorer = dataclasses.replace(model.scorer, params=put(model.scorer.params), mesh=mesh)
    params = {"params": put(model.params), "tokenizer_params": put(model.tokenizer_params)}
    spread = dataclasses.replace(model, **params, scorer=scorer, mesh=mesh)
    again = measure({"maskgit": Model(spread, SAMPLING)}, tests, OPTIONS)
    assert (measured.metrics["protocol"]["device"], again.metrics["protocol"]["device"]) == ("1 x cpu", "2 x cpu")
    one, other = (numbers(found.metrics) for found in (measured, again))
    assert one.keys() == other.keys() and ("maskgit", "image_nats_per_token") in one
    for name in one:
        assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4, nan_ok=True), name


def numbers(metrics):
    """Returns all numbers except times."""
    flat = traverse_util.flatten_dict(metrics).items()
    return {name: x for name, x in flat if isinstance(x, float) and name[-1] != "seconds_per_image"}


def fid(model, real, drawn):
    sets = [frechet.add(frechet.empty(6, "clip"), model.scorer.image_features(x)) for x in (real, drawn)]
    return pytest.approx(frechet.distance(*sets), rel=1e-4, abs=1e-9)


def test_the_tokenizer(measured, model, tests):
    real = tests.images(range(COUNT))
    tokens = model.encode(real)
    shown, found = model.decode(tokens), measured.metrics["dvae"]
    error = np.square((real.astype(float) - shown) / 255).mean((1, 2, 3))
    assert found["psnr"] == pytest.approx((-10 * np.log10(error)).mean(), rel=1e-5)
    assert found["codebook_usage"] == pytest.approx(float(codebook.usage(codebook.count(tokens, 24))))
    assert found["rfid_clip"] == fid(model, real, shown) and found["rfid_clip"] > 0
    assert found["caption_accuracy"] == shapes.score(shown, tests.scenes)["caption_accuracy"]
    assert found.keys() >= {"ssim", "precision_clip", "recall_clip"} and "fid_clip" not in found


def test_one_sample_for_each_caption(measured, model, tests):
    """Batches have two rows and the last one is filled up. Each caption counts once."""
    drawn = model.generate(tests.captions, seed=3, temperature=0.7)[:, 0]
    found, real = measured.metrics["maskgit"], tests.images(range(COUNT))
    text, tokens, nats = model.encode_text(tests.captions), model.encode(real), 0
    for rows, valid in (([0, 1], [1, 1]), ([2, 3], [1, 1]), ([4, 4], [1, 0])):
        given = text[rows], tokens[rows], jax.random.key(0)
        _, scalars = model.prior.loss(model.params, *given, train=False, valid=jax.numpy.array(valid, bool))
        nats += sum(valid) * float(scalars["image_nats"])
    assert found["fid_clip"] == fid(model, real, drawn)
    cosines = model.scorer.score(drawn, tests.captions)
    assert found["clip_score"] == pytest.approx(100 * np.maximum(cosines, 0).mean(), rel=1e-5)
    assert found["caption_accuracy"] == shapes.score(drawn, tests.scenes)["caption_accuracy"]
    assert found["steps"] == 3 and found["seconds_per_image"] > 0
    assert found["image_nats_per_token"] == pytest.approx(nats / COUNT, rel=1e-5)


def test_retrieval_of_the_clip(measured, model, tests):
    scorer, captions = model.scorer, tests.captions
    real = tests.images(range(COUNT))
    expected = retrieval(scorer.image_features(real), scorer.text_features(captions), scorer.encode_text(captions))
    assert measured.metrics["clip"] == expected


def test_the_best_of_each_number_of_candidates(measured, model, tests):
    captions, scenes = tests.captions[:4], tests.scenes[:4]
    drawn = model.generate(captions, n=N, seed=3, temperature=0.7)
    scores = np.stack([model.scorer.score(images, [caption] * N) for images, caption in zip(drawn, captions)])
    right = np.stack([shapes.right_captions(images, [scene] * N) for images, scene in zip(drawn, scenes)])
    found = measured.metrics["best_of"]["maskgit"]
    assert list(found) == ["1", "2", "4", "5"]
    for number in (1, 2, 4, 5):
        best = [
            (scores[c, group][k], right[c, group][k])
            for c in range(4)
            for group in (slice(i, i + number) for i in range(0, N - number + 1, number))
            for k in [scores[c, group].argmax()]
        ]
        row = found[str(number)]
        assert row["clip_score"] == pytest.approx(100 * np.mean([max(score, 0) for score, _ in best]), rel=1e-5)
        assert row["caption_accuracy"] == pytest.approx(np.mean([verdict for _, verdict in best]))
        first = np.stack([images[s[:number].argmax()] for images, s in zip(drawn, scores)])
        assert row["fid_clip"] == fid(model, tests.images(range(COUNT)), first)
    assert [found[n]["clip_score"] for n in found] == sorted(found[n]["clip_score"] for n in found)
    assert len({row["fid_clip"] for row in found.values()}) > 1


def test_blur_of_all_sets_of_images(measured):
    found = measured.metrics["blur"]
    assert found.keys() == {"reconstructed", "maskgit"} and found["maskgit"].keys() == {"0", "1"}
    assert found["maskgit"]["0"] == {"fid_clip": measured.metrics["maskgit"]["fid_clip"]}
    assert found["reconstructed"]["0"]["fid_clip"] == measured.metrics["dvae"]["rfid_clip"]
    assert found["maskgit"]["1"] != found["maskgit"]["0"]


def test_the_protocol(measured, model):
    found = measured.metrics["protocol"]
    assert found["captions"] == "5, first" and found["seed"] == 3 and found["candidate_captions"] == 4
    assert found["sampling"]["maskgit"]["temperature"] == 0.7
    weights = found["weights"]
    assert weights.keys() == {"tokenizer", "maskgit", "clip"} and len(set(weights.values())) == 3
    assert other_clip(model.scorer).fingerprint() != weights["clip"]


def test_without_a_clip(model, tests):
    bare = {"maskgit": Model(dataclasses.replace(model, scorer=None), SAMPLING)}
    with pytest.raises(ConfigError, match="metrics.candidates"):
        measure(bare, tests, OPTIONS)
    metrics = measure(bare, tests, dataclasses.replace(OPTIONS, candidates=0)).metrics
    assert metrics.keys() == {"dvae", "maskgit", "protocol"}
    assert metrics["maskgit"].keys() >= {"image_nats_per_token"} and "clip_score" not in metrics["maskgit"]


def test_priors_with_different_tokenizers_are_rejected(model, tests):
    other = dataclasses.replace(model, tokenizer_params=jax.tree.map(lambda x: -x, model.tokenizer_params))
    models = {name: Model(each, SAMPLING) for name, each in (("one", model), ("two", other))}
    with pytest.raises(ConfigError, match="tokenizer"):
        measure(models, tests, OPTIONS)


def test_the_written_report(measured, tests, tmp_path, capsys):
    config = ConfigDict({"job": "evaluate", "count": 5, "metrics": {"blur": (0, 1), "inception": placeholder(str)}})
    config.copy = config.get_oneway_ref("count")
    write(measured, tests.captions, tmp_path, "A title", config)
    printed = capsys.readouterr().out
    assert "maskgit.fid_clip" in printed and str(tmp_path / "report.html") in printed
    metrics = json.loads((tmp_path / "report.json").read_text())
    assert metrics.keys() == measured.metrics.keys()
    with (tmp_path / "best_of.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["prior"], row["candidates"]) for row in rows] == [("maskgit", n) for n in "1245"]
    assert float(rows[2]["fid_clip"]) == pytest.approx(
        measured.metrics["best_of"]["maskgit"]["4"]["fid_clip"], rel=1e-5
    )
    with (tmp_path / "blur.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["images"], row["radius"]) for row in rows] == [
        ("maskgit", "0"), ("maskgit", "1"), ("reconstructed", "0"), ("reconstructed", "1"),
    ]  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 4  # three metrics by candidates, one by radius
    for text in ("A title", "captions_sha256", "job: evaluate", "maskgit, 4", f"{COUNT}, first"):
        assert text in page, text
    settings = page.partition("<details><summary>Configuration</summary><pre>")[2].partition("</pre></details>")[0]
    assert yaml.safe_load(html.unescape(settings)) == {
        "job": "evaluate", "count": 5, "copy": 5, "metrics": {"blur": [0, 1], "inception": None},
    }  # fmt: skip
    assert "!!" not in settings and len(settings.splitlines()) == 6
    names = [name for name, _ in measured.columns]
    assert names == ["real", "reconstructed", "maskgit", f"best of {N}"]
    assert np.asarray(Image.open(tmp_path / "grid.png")).ndim == 3


def other_clip(scorer):
    return dataclasses.replace(scorer, params=jax.tree.map(lambda x: x + 1e-3, scorer.params))


def test_one_clip_for_all_priors(measured, model, tests):
    """A prior without a CLIP is ranked and scored by the CLIP of another prior."""
    models = {"with": Model(model, SAMPLING), "without": Model(dataclasses.replace(model, scorer=None), SAMPLING)}
    for order in (["with", "without"], ["without", "with"]):
        metrics = measure({name: models[name] for name in order}, tests, OPTIONS).metrics
        for name in order:
            assert numbers(metrics[name]) == pytest.approx(
                numbers(measured.metrics["maskgit"]), rel=0, abs=0, nan_ok=True
            )
            assert metrics["best_of"][name] == measured.metrics["best_of"]["maskgit"]
        assert metrics["protocol"]["weights"]["clip"] == model.scorer.fingerprint()


def test_different_clips_are_rejected_before_the_first_measurement(model, tests, monkeypatch):
    other = dataclasses.replace(model, scorer=other_clip(model.scorer))
    monkeypatch.setattr(TextToImage, "encode", lambda *_: pytest.fail("measured before the check"))
    with pytest.raises(ConfigError, match="config.clip"):
        measure({"one": Model(model, SAMPLING), "two": Model(other, SAMPLING)}, tests, OPTIONS)
