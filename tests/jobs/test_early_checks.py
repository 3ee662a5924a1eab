"""Drawing and evaluation check before the model is loaded: folders, files of prompts, values, the machine."""

import os
import socket
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from dalle_jax.configuration import config_files
from dalle_jax.distributed import joining
from dalle_jax.errors import ConfigError, DataError, UserError
from dalle_jax.jobs import evaluate, evaluate_classes, generate
from dalle_jax.storage import reachable
from dalle_jax.storage.files import make_workdir
from dalle_jax.text_to_image.text_to_image import TextToImage

ROOT = generate.__file__.rpartition("/dalle_jax/")[0]
JOBS = {"generate": generate, "evaluate": evaluate, "evaluate:imagenet": evaluate_classes}


class Loaded(Exception):
    """The model would be loaded now."""


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch, tmp_path):
    def load(*_, **__):
        raise Loaded

    monkeypatch.setattr(TextToImage, "load", load)
    monkeypatch.chdir(tmp_path)


def run(name, workdir="out", **changes):
    config: ConfigDict = config_files.load(f"{ROOT}/configs/{name}.py".replace(":imagenet.py", ".py:imagenet"))
    if name == "generate":
        config.prompts = "a red circle"
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    JOBS[name].run(config, workdir)


@pytest.mark.parametrize("name", JOBS)
def test_good_values_reach_the_model(name, tmp_path):
    with pytest.raises(Loaded):
        run(name)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("name", JOBS)
@pytest.mark.parametrize("place", ["a_file", "a_file/out", ""])
def test_where_results_go_is_tried_first(name, place, tmp_path):
    (tmp_path / "a_file").write_text("")
    with pytest.raises(ConfigError, match=place or "workdir"):
        run(name, place)


@pytest.mark.parametrize(
    "name, key, value, token",
    [
        ("generate", "n", 0, "config.n "),
        ("generate", "n", 10**9, "config.n "),
        ("generate", "candidates", -1, "config.candidates "),
        ("generate", "candidates", 2, "config.n is 4"),
        ("generate", "rows_at_once", 0, "config.rows_at_once "),
        ("generate", "seed", 2**32, "config.seed "),
        ("generate", "step", "newest", "config.step "),
        ("generate", "step", 2.5, "config.step "),
        ("generate", "sampling.guidance", float("nan"), "config.sampling.guidance "),
        ("generate", "sampling.guidance", 1e30, "config.sampling.guidance "),
        ("generate", "sampling.steps", 10**9, "config.sampling.steps "),
        ("generate", "mesh.data", 64, "data=64"),
        ("generate", "prompts", "a||b", "config.prompts="),
        ("evaluate", "seed", -1, "config.seed "),
        ("evaluate", "rows_at_once", 0, "config.rows_at_once "),
        ("evaluate", "count", 0, "config.count "),
        ("evaluate", "metrics.blur", (-1,), "config.metrics.blur "),
        ("evaluate", "metrics.blur", (float("nan"),), "config.metrics.blur "),
        ("evaluate", "metrics.inception", "no/such.pth", "no/such.pth"),
        ("evaluate", "metrics.candidates", 2**31, "config.metrics.candidates "),
        ("evaluate", "metrics.inception_resize", "cubic", "config.metrics.inception_resize "),
        ("evaluate", "sampling.temperature", float("inf"), "config.sampling.temperature "),
        ("generate", "sampling.guidance_schedule", "quadratic", "config.sampling.guidance_schedule "),
        ("evaluate", "sampling.guidance_schedule", "linear", "--config.sampling.guidance"),
        ("evaluate:imagenet", "count", 0, "config.count "),
        ("evaluate:imagenet", "reference", "nowhere.npz", "config.reference=nowhere.npz "),
        ("evaluate:imagenet", "metrics.inception", "no/such.pth", "no/such.pth"),
    ],
)
def test_values(name, key, value, token):
    with pytest.raises(UserError, match=token):
        run(name, **{key: value})


def _folder(path):
    path.mkdir()


@pytest.mark.parametrize(
    "make, token",
    [
        (lambda path: None, "does not exist"),
        (_folder, "not a text file"),
        (os.mkfifo, "not a text file"),
        (lambda path: path.write_bytes("été".encode("latin-1")), "UTF-8"),
        (lambda path: path.write_bytes("a".encode("utf-16")), "UTF-8"),
        (lambda path: path.write_text(""), "no caption"),
        (lambda path: path.write_bytes(b"\xef\xbb\xbf \n\n"), "no caption"),
    ],
)
def test_files_of_prompts(make, token, tmp_path):
    make(tmp_path / "prompts.txt")
    with pytest.raises(DataError, match=f"prompts.txt.*{token}"):
        run("generate", prompts="", prompts_file="prompts.txt")


def test_a_byte_order_mark_is_no_letter(tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufeffa red circle\r\n\na star\n".encode())
    config = config_files.load(f"{ROOT}/configs/generate.py")
    config.prompts_file = "prompts.txt"
    assert generate.read_captions(config) == ["a red circle", "a star"]


# -- the machine --------------------------------------------------------------------------------------------------


def test_a_missing_kind_of_device():
    environment = {**os.environ, "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cuda"}
    command = [sys.executable, "-m", "dalle_jax.main", f"--config={ROOT}/configs/generate.py", "--config.prompts=a"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "JAX_PLATFORMS=cuda" in done.stderr


def test_devices_that_exist():
    joining.check_devices()


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setattr(reachable.urllib.request, "getproxies", dict)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    reachable._connect.cache_clear()
    yield
    reachable._connect.cache_clear()


def test_object_storage_that_cannot_be_reached(no_proxy):
    with pytest.raises(ConfigError, match="127.0.0.1:9"):
        make_workdir("gs://bucket/run")


def test_object_storage_that_is_silent(no_proxy, monkeypatch):
    waits = reachable.threading.Event()

    def connect(*_):
        waits.wait(5)
        raise OSError("too late")

    monkeypatch.setattr(reachable, "_SECONDS", 0.05)
    monkeypatch.setattr(reachable.socket, "create_connection", connect)
    with pytest.raises(ConfigError, match="no answer"):
        reachable.check_reachable("gs://bucket/run")
    waits.set()


def test_object_storage_that_answers_is_asked_once(no_proxy, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.getsockname()[1]}")
        reachable.check_reachable("gs://bucket/run")
    reachable.check_reachable("gs://bucket/run")
    reachable.check_reachable("a/local/path")
