"""An evaluation that several hosts share equals that of one host. Hosts are simulated by processes of this machine."""

import dataclasses
import json
from unittest import mock

import jax
import numpy as np
import pytest
from processes import finish, free_address, spawn
from small_evaluation import (
    COUNT,
    OPTIONS,
    SAMPLING,
    make_class_model,
    make_model,
    open_classes,
    open_tests,
    write_class_folders,
    write_images,
)
from test_feature_extractors import EXTRACTORS, IMAGES, OTHERS

from dalle_jax.errors import ConfigError
from dalle_jax.evaluation import feature_extractors
from dalle_jax.evaluation.by_class import ClassMetrics, ClassProtocol, measure_classes
from dalle_jax.evaluation.feature_extractors import ImageSet
from dalle_jax.evaluation.measure import Model, measure

HOSTS = 2
HOST = """
import pathlib, sys

_, address, index, folder = sys.argv
folder = pathlib.Path(folder)
sys.path.append("tests/evaluation")
from dalle_jax.distributed.joining import start
start("evaluate", address, 2, int(index), connect_seconds=120)
from test_hosts import results
results(folder, folder / f"text_{index}", folder / f"host_{index}")
"""


def results(images, text, file):
    """Measures sets of images, a model and a model of classes, and writes `file`.json and `file`.npz."""
    text.mkdir()
    model = {"maskgit": Model(make_model(text), SAMPLING)}
    measured = measure(model, open_tests(images / "images"), OPTIONS)
    classes = make_class_model(text)
    by_class = measure_classes(
        {"classes": Model(classes, SAMPLING)}, ClassProtocol(11, seed=3), ClassMetrics(classifier=True),
        open_classes(images / "classes", classes),
    )  # fmt: skip
    metrics = {"sets": compare(), "model": measured.metrics, "by_class": by_class.metrics}
    file.with_suffix(".json").write_text(json.dumps(metrics))
    np.savez(file, **dict([*measured.columns, *by_class.columns]))


def compare():
    """Compares two sets of images, of which each host adds its share in two pieces."""
    from dalle_jax.distributed.exchange import share

    sets = []
    for images in (IMAGES, OTHERS):
        mine = share(len(images))
        found = ImageSet(EXTRACTORS, len(images), (0, 1), mine)
        for part in (mine[:3], mine[3:]):
            found.add(images[part.start : part.stop])
        sets.append(found.of_all_hosts())
    real, drawn = sets
    features = {"features": drawn.features("two").tolist()}
    return {"0": drawn.distances(real, 0), "1": drawn.distances(real, 1), **drawn.precision_recall(real)} | features


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns (metrics, columns) of one host, and of each of two hosts."""
    folder, address = tmp_path_factory.mktemp("hosts"), free_address()
    (folder / "images").mkdir()
    write_images(folder / "images")
    (folder / "classes").mkdir()
    write_class_folders(folder / "classes")
    ended = finish([spawn(["-c", HOST, address, str(i), str(folder)]) for i in range(HOSTS)])
    assert [status for status, *_ in ended] == [0] * HOSTS, ended
    results(folder, folder / "text", folder / "alone")
    files = [folder / name for name in ("alone", "host_0", "host_1")]
    return [(json.loads(f.with_suffix(".json").read_text()), dict(np.load(f.with_suffix(".npz")))) for f in files]


def test_every_host_has_the_metrics_of_one_host(runs):
    (alone, _), *hosts = runs
    leaves = lambda metrics: jax.tree.leaves_with_path({k: v for k, v in metrics.items() if k != "protocol"})
    for metrics, _ in hosts:
        for part in ("sets", "model", "by_class"):
            expected, found = leaves(alone[part]), leaves(metrics[part])
            assert [path for path, _ in expected] == [path for path, _ in found]
            for (path, one), (_, other) in zip(expected, found):
                if "seconds_per_image" not in jax.tree_util.keystr(path):
                    assert other == pytest.approx(one, rel=1e-5, abs=1e-6, nan_ok=True), path
        for name, value in alone["sets"].items():
            if name.startswith(("precision", "recall", "features")):
                assert metrics["sets"][name] == value
    assert hosts[0][0]["model"]["maskgit"]["fid_clip"] > 0.01
    assert hosts[0][0]["by_class"]["classes"]["fid_clip"] > 0.01


def test_every_host_has_the_first_images(runs):
    (_, alone), *hosts = runs
    for _, columns in hosts:
        assert columns.keys() == alone.keys()
        for name, images in alone.items():
            np.testing.assert_array_equal(columns[name], images)


def test_the_report_names_the_hosts(runs):
    (alone, _), *hosts = runs
    for part in ("model", "by_class"):
        for metrics, _ in hosts:
            described = metrics[part]["protocol"]
            assert described.pop("device") == "2 hosts, each 1 x cpu"
            assert described == {k: v for k, v in alone[part]["protocol"].items() if k != "device"}


class Accepted(Exception):
    """Raised by the first step after the checks."""


@pytest.mark.parametrize("candidates, hosts, key", [(0, 6, "config.count"), (5, 5, "candidate_captions")])
def test_more_hosts_than_captions_are_rejected(tmp_path, monkeypatch, candidates, hosts, key):
    """There are five images and captions. Four captions are ranked, if there are candidates."""
    write_images(tmp_path)
    model, tests = {"maskgit": Model(make_model(tmp_path), SAMPLING)}, open_tests(tmp_path)
    options = dataclasses.replace(OPTIONS, candidates=candidates)
    monkeypatch.setattr(jax, "process_count", lambda: hosts)
    with pytest.raises(ConfigError, match=key):
        measure(model, tests, options)
    monkeypatch.setattr(jax, "process_count", lambda: hosts - 1)
    monkeypatch.setattr(feature_extractors, "clip", mock.Mock(side_effect=Accepted))
    with pytest.raises(Accepted):
        measure(model, tests, options)
    assert len(tests.captions) == COUNT
