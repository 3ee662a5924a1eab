"""Every metric that is logged or reported has a meaning."""

import json
import pathlib

import pytest

from dalle_jax.reporting.meanings import HIGHER, LOWER, meaning

RESULTS = pathlib.Path(__file__).parents[2] / "experiments" / "results"


def names_of(section, prefix=""):
    for name, value in section.items():
        if isinstance(value, dict):
            yield from names_of(value, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}"


def test_every_metric_of_the_reports_has_a_meaning():
    report = json.loads((RESULTS / "quickstart" / "report.json").read_text())
    measured = {name: report[name] for name in ("clip", "dvae", "autoregressive", "maskgit")}
    names = {name for section in measured.values() for name in names_of(section)}
    assert len(names) > 20 and [name for name in names if meaning(name) is None] == []


@pytest.mark.parametrize(
    "name, direction",
    [
        ("psnr", HIGHER), ("eval/psnr", HIGHER), ("fid", LOWER), ("rfid_clip", LOWER), ("recall_inception", HIGHER),
        ("eval/image_nats", LOWER), ("image_nats_masked_25_50", LOWER), ("train/loss", LOWER), ("elbo", HIGHER),
        ("lpips", LOWER), ("retrieval@1", HIGHER), ("kl_nats", ""), ("learning_rate", ""),
    ],
)  # fmt: skip
def test_directions(name, direction):
    assert meaning(name).direction == direction


def test_names_that_are_no_metrics():
    assert meaning("nothing") is None and meaning("fid_") is None and meaning("left_out/empty") is None


def test_a_meaning_is_one_plain_sentence():
    from dalle_jax.reporting import meanings

    for pattern, (direction, sentence) in meanings._MEANINGS.items():
        assert direction in (HIGHER, LOWER, "") and sentence[0].isupper() or sentence[0].isdigit(), pattern
        assert sentence.endswith(".") and len(sentence.split()) <= 25, pattern
