"""Workdirs on object storage, with gcsfs, orbax and tensorstore against an emulator (object_storage.py)."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
import tiny_copies
from etils import epath
from object_storage import emulated_bucket, names
from tiny_job import tiny_config, tiny_job

from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.workdir import read_config
from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.errors import CheckpointError, ConfigError, UserError
from dalle_jax.reporting.metric_writer import MetricWriter, read_metrics
from dalle_jax.storage import mirror as mirror_module
from dalle_jax.storage.files import full_path, make_workdir, write_atomically
from dalle_jax.storage.mirror import Mirror
from dalle_jax.training.loop import train


@pytest.fixture(scope="module")
def bucket():
    with emulated_bucket() as path:
        yield path


# -- data ---------------------------------------------------------------------------------------------------------


def test_tar_shards_in_a_bucket_are_read_in_place(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    local = tiny_copies.tar_shards(tmp_path / "shards", shards=2, samples=5)
    (bucket / "shards").mkdir()
    for shard in local.iterdir():
        (bucket / "shards" / shard.name).write_bytes(shard.read_bytes())
    images = []
    for path in (local, bucket / "shards"):
        options = DataOptions(source="tar_shards", path=str(path), data_dir=str(bucket / "data"))
        source = open_source(options, "all")
        images.append([(record.image, record.captions) for record in map(source.record, range(len(source)))])
    assert images[0] == images[1] and len(images[0]) == 10
    assert len(list((tmp_path / "home").rglob("index.json"))) == 2, "an index is local"


# -- paths and files ----------------------------------------------------------------------------------------------


def test_full_paths(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(full_path("gs://bucket/run")) == "gs://bucket/run"
    assert str(full_path("~/run")) == str(full_path("run")) == str(tmp_path / "run")
    assert make_workdir("~/run") == str(tmp_path / "run") and (tmp_path / "run").is_dir()


_IMPORTS = textwrap.dedent("""
    import fsspec
    from absl import logging
    import dalle_jax.text_to_image.text_to_image, dalle_jax.training.loop
    from dalle_jax.storage.files import full_path

    assert "gcs" not in fsspec.config.conf and not logging.get_absl_logger().filters
    full_path("runs/a")
    assert "gcs" not in fsspec.config.conf
    full_path("gs://bucket/run")
    assert fsspec.config.conf["gcs"] == {"use_listings_cache": False}
""")


def test_settings_of_libraries_change_at_first_use_not_at_import():
    process(_IMPORTS)


def test_a_workdir_must_be_accessible(bucket, monkeypatch):
    assert make_workdir(bucket / "made") == "gs://bucket/made"
    with pytest.raises(ConfigError, match="nowhere"):
        make_workdir("gs://nowhere/run")

    def missing(*_):
        raise ImportError("Install gcsfs to access Google Storage")

    monkeypatch.setattr("etils.epath.backend._FileSystemSpecBackend.fs", missing)
    for first_use in (make_workdir, read_config):
        with pytest.raises(ConfigError, match=r"dalle_jax\[gcs\]"):
            first_use("gs://bucket/run")


def test_a_rejected_request_names_its_reason(bucket, monkeypatch):
    def refused(*_, **__):
        raise OSError("Forbidden: https://storage.googleapis.com/…")  # as gcsfs raises it

    with monkeypatch.context() as patch:
        patch.setattr("etils.epath.backend._FileSystemSpecBackend.exists", refused)
        with pytest.raises(ConfigError, match="Forbidden"):
            make_workdir("gs://bucket/run")
    monkeypatch.setattr("dalle_jax.checkpoints.checkpoints.Manager", refused)
    with pytest.raises(CheckpointError, match="gs://bucket/run/checkpoints.*Forbidden"):
        Checkpoints("gs://bucket/run")


def test_atomic_writes(bucket, tmp_path):
    for folder in (bucket / "whole", tmp_path / "whole"):
        write_atomically(folder / "a", b"first")
        write_atomically(folder / "a", b"second")
        assert (folder / "a").read_bytes() == b"second" and names(folder) == ["a"]


def test_a_mirror_copies_what_changed(bucket, monkeypatch):
    target = bucket / "mirror"
    (target / "kept").write_bytes(b"old")
    mirror = Mirror(target)
    mirror.fetch("kept")
    mirror.fetch("missing")
    with open(mirror.folder / "kept", "ab") as file:
        file.write(b" and new")
    (mirror.folder / "deep" / "er").mkdir(parents=True)
    (mirror.folder / "deep" / "er" / "file").write_bytes(b"1")
    mirror.upload()
    assert names(target) == ["deep/er/file", "kept"] and (target / "kept").read_bytes() == b"old and new"
    (target / "kept").unlink()
    (mirror.folder / "deep" / "er" / "file").write_bytes(b"12")
    mirror.close()
    assert names(target) == ["deep/er/file"] and (target / "deep" / "er" / "file").read_bytes() == b"12"
    assert not mirror.folder.exists()


def test_metrics_and_images_reach_the_bucket(bucket, monkeypatch):
    """A flush uploads them. An outage is logged, then uploads are retried. A resumed run keeps earlier metrics."""
    workdir = str(bucket / "metrics")
    writer = MetricWriter(workdir)
    writer.scalars(1, {"train/loss": 2.0})
    assert read_metrics(workdir) == []
    writer.image(1, "preview", np.zeros((4, 6, 3), np.uint8))
    writer.flush()
    assert [line["step"] for line in read_metrics(workdir)] == [1]

    logged = []
    monkeypatch.setattr(mirror_module.logging, "warning", lambda text, *values: logged.append(text % values))
    monkeypatch.setattr(mirror_module, "_UPLOAD_SECONDS", 0.0)
    with monkeypatch.context() as outage:

        def down(*_, **__):
            raise OSError(5, "the storage is down")

        outage.setattr("etils.epath.backend._FileSystemSpecBackend.open", down)
        writer.scalars(2, {"train/loss": 1.0})
        with pytest.raises(UserError, match="gs://bucket/metrics"):
            writer.flush()
    assert len(logged) == 1 and "the storage is down" in logged[0]
    writer.scalars(3, {"train/loss": 0.5})
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3]
    writer.close()

    writer = MetricWriter(workdir, start=2)
    writer.close()
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2]
    kinds = {name.split("/")[0] for name in names(epath.Path(workdir))}
    assert kinds == {"metrics.jsonl", "samples", "tensorboard"}


def test_metrics_are_in_the_bucket_before_a_checkpoint(bucket, monkeypatch):
    """A run that is killed right after a checkpoint resumes with all metrics up to it."""
    seen = {}
    workdir = str(bucket / "before")
    monkeypatch.setattr(Checkpoints, "save", lambda self, step, *_: seen.update({step: len(read_metrics(workdir))}))
    config = tiny_config(steps=4, cadence__eval=0, cadence__checkpoint=2)
    train(config, workdir, tiny_job(config))
    assert seen == {2: 2, 4: 5}  # the last step is also evaluated


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_ignored(bucket):
    """A killed process leaves objects without the final mark. The run resumes from the checkpoint before."""
    workdir = str(bucket / "half")
    run = lambda steps: train(config := tiny_config(steps=steps, cadence__checkpoint=1), workdir, tiny_job(config))
    run(2)
    (bucket / "half" / "checkpoints" / "2" / "commit_success.txt").unlink()
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.steps == [1]
    assert int(run(3).step) == 3
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.latest_step == 3


def test_event_files_stay_small(tmp_path, monkeypatch):
    """TensorBoard reads them in the order of their names."""
    monkeypatch.setattr("dalle_jax.reporting.tensorboard._LARGEST_FILE", 100)
    writer = MetricWriter(str(tmp_path))
    for step in range(9):
        writer.scalars(step, {f"train/{'a' * 50}": float(step)})
    writer.close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.name)
    assert 3 < len(files) < 9 and all(path.stat().st_size < 500 for path in files)
    assert [path.name[-4:] for path in files] == [f"{i:04d}" for i in range(len(files))]


# -- whole runs, in separate processes ----------------------------------------------------------------------------

_RUN = textwrap.dedent("""
    import dataclasses, os, pickle, signal, sys
    import jax
    from tiny_job import tiny_config, tiny_job
    from dalle_jax.training.loop import train

    workdir, stop_at, result = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    logged = []

    def data_counts():
        logged.append(1)
        if len(logged) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"unreadable": 2}

    config = tiny_config(cadence__checkpoint=3, keep__last=1, keep__best=0)
    state = train(config, workdir, dataclasses.replace(tiny_job(config), data_counts=data_counts))
    with open(result, "wb") as file:
        pickle.dump(jax.device_get(state.params), file)
""")


def process(script, *arguments):
    here = str(pathlib.Path(__file__).parents[1])
    path = os.pathsep.join([here, f"{here}/text_to_image", os.path.dirname(here)])
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_a_run_stops_and_resumes_bit_for_bit(bucket, tmp_path):
    """SIGTERM at step 4 saves to the bucket. The same command then ends like an uninterrupted run."""
    workdir, result = bucket / "run", tmp_path / "params"
    assert "stopped at step" in process(_RUN, workdir, 4, result)
    (stopped,) = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert 4 <= int(stopped) < 10 and not result.exists()
    assert f"resuming from step {stopped} of 10" in process(_RUN, workdir, 99, result)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["10"]  # older ones are deleted completely
    config = tiny_config()
    state = train(config, str(tmp_path / "local"), tiny_job(config))
    jax.tree.map(np.testing.assert_array_equal, np.load(result, allow_pickle=True), jax.device_get(state.params))
    lines = [read_metrics(str(run)) for run in (workdir, tmp_path / "local")]
    losses = [[line["train/loss"] for line in run if "train/loss" in line] for run in lines]
    assert losses[0] == losses[1] and len(losses[0]) == 10
    assert json.loads((workdir / "config.json").read_text())["model"] == {"hidden": 16, "remat": False}
    assert any("tensorboard/events" in name for name in names(workdir))


_PRIOR = textwrap.dedent("""
    import pathlib, sys
    import numpy as np
    from etils import epath
    from test_text_to_image import tiny_prior
    from dalle_jax import TextToImage
    from dalle_jax.configuration import config_files
    from dalle_jax.jobs import generate, train as train_job

    bucket, data = epath.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    config = tiny_prior(bucket, data)
    config.data_tokens = "once"
    config.profile_steps = 1
    train_job.run(config, config.workdir)
    model = TextToImage.load(config.workdir, rows_at_once=2)
    images = model.generate("a red circle", n=2, seed=0)
    np.testing.assert_array_equal(images, TextToImage.load(config.workdir, step="best").generate("a red circle", n=2))
    jobs = config_files.load(f"{sys.argv[3]}/generate.py")
    jobs.update({"model_workdir": config.workdir, "prompts": "a red circle", "n": 2})
    generate.run(jobs, str(bucket / "images"))
""")


@pytest.mark.slow
def test_a_prior_and_its_images_in_a_bucket(bucket, tmp_path):
    """Tokenizer, prior, frozen files, profile and generated images: none of them is on the local disk."""
    configs = os.path.join(pathlib.Path(__file__).parents[2], "configs")
    process(_PRIOR, bucket / "prior_runs", tmp_path, configs)
    found = names(bucket / "prior_runs")
    tops = {"/".join(name.split("/")[:2]) for name in found}
    assert {"prior/config.json", "prior/text", "prior/image_tokenizer", "dvae/metrics.jsonl"} <= tops
    assert sum(name.startswith("prior/tokens-") and name.endswith(".npy") for name in found) == 1
    assert any(name.startswith("prior/profile/") and name.endswith(".xplane.pb") for name in found)
    assert "images/manifest.json" in found and sum(n.startswith("images/") for n in found) >= 3
