"""`python -m dalle_jax.runs`: every run of a folder, its size, and what may be deleted."""

import json
import pathlib

import pytest
import untrained_run
from tiny_job import tiny_config, tiny_job

from dalle_jax import runs
from dalle_jax.errors import CheckpointError
from dalle_jax.training.loop import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prior with its tokenizer, a CLIP-less folder, and a damaged run."""
    folder = tmp_path_factory.mktemp("runs")
    untrained_run.image_tokenizer(folder / "dvae")
    prior = pathlib.Path(untrained_run.prior(folder / "deep" / "prior"))
    config = json.loads((prior / "config.json").read_text())
    config["tokenizer"]["workdir"] = str(folder / "dvae")
    (prior / "config.json").write_text(json.dumps(config))
    (prior / "config.json.sha256").unlink()
    (prior / "tokens-abc").mkdir()
    (prior / "tokens-abc" / "part").write_bytes(b"x" * 5000)
    (folder / "other").mkdir()
    (folder / "other" / "notes.txt").write_text("nothing")
    (folder / "broken").mkdir()
    (folder / "broken" / "config.json").write_text("{")
    return folder


def test_every_run_is_found_with_its_state(folder):
    found = {run.path: run for run in runs.find(str(folder))}
    assert list(found) == [str(folder / name) for name in ("broken", "deep/prior", "dvae")]
    prior, dvae = found[str(folder / "deep" / "prior")], found[str(folder / "dvae")]
    assert (prior.kind, dvae.kind) == ("autoregressive prior shapes", "dvae shapes")
    assert prior.data == "shapes_captions, 16 px" and prior.progress == "7 steps, finished"
    assert prior.result == "image_nats 1.25 nats per image token" and dvae.result == "psnr 21 dB"
    assert prior.size == sum(path.stat().st_size for path in (folder / "deep").rglob("*") if path.is_file())
    assert found[str(folder / "broken")].kind == "damaged"


def test_what_may_be_deleted(folder):
    found = {run.path: run for run in runs.find(str(folder))}
    prior, dvae = found[str(folder / "deep" / "prior")], found[str(folder / "dvae")]
    assert [(item.path, item.size) for item in prior.deletable] == [(str(folder / "deep/prior/tokens-abc"), 5000)]
    (copied,) = dvae.deletable
    assert copied.path == dvae.path and prior.path in copied.reason, "the prior holds a copy of it"


def test_checkpoints_that_are_neither_best_nor_latest(tmp_path):
    config = tiny_config(steps=20, keep__last=3, keep__best=1)
    train(config, str(tmp_path / "run"), tiny_job(config))
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert len(steps) >= 3 and steps[-1] == 20
    finished = json.loads((tmp_path / "run" / "finished.json").read_text())
    finished["best"]["step"] = steps[0]
    (tmp_path / "run" / "finished.json").write_text(json.dumps(finished))
    (run,) = runs.find(str(tmp_path))
    assert [pathlib.Path(item.path).name for item in run.deletable] == [str(step) for step in steps[1:-1]]
    assert run.progress == "20 steps, finished" and run.result.startswith("error ")


def test_the_command(folder, capsys):
    assert runs.main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert text.count("may be deleted") == 2 and "3 runs, " in text
    assert runs.main([str(folder / "other")]) == 0 and "holds no runs" in capsys.readouterr().out
    assert runs.main([str(folder / "nowhere")]) == 1 and "nowhere" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="gs://"):
        runs.find("gs://bucket/runs")


@pytest.mark.parametrize("count, text", [(0, "0 B"), (999, "999 B"), (1234, "1.23 kB"), (56_700_000, "56.7 MB")])
def test_bytes_as_text(count, text):
    assert runs.bytes_as_text(count) == text
