"""Addresses of a hub, against one that is simulated on loopback."""

import dataclasses
import pathlib
import sys

import numpy as np
import pytest
import untrained_run
from hub_server import COMMIT, serve

from dalle_jax import TextToImage
from dalle_jax.checkpoints import downloaded
from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.errors import ConfigError, DamagedError, HubError
from dalle_jax.export.__main__ import main
from dalle_jax.jobs import evaluate
from dalle_jax.pretrained import catalogue
from dalle_jax.pretrained.__main__ import main as import_weights
from dalle_jax.storage import hub as module
from dalle_jax.storage.files import expanded

constants = pytest.importorskip("huggingface_hub.constants", reason="the package huggingface_hub is not installed")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    downloaded._download.cache_clear()
    with serve() as (simulated, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        simulated.files["owner/weights"] = {"model.bin": bytes(range(256)) * 20, "notes.txt": b"x"}
        yield simulated
    downloaded._download.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    run = untrained_run.prior(tmp_path_factory.mktemp("runs") / "prior", "maskgit.py:shapes")
    folder = tmp_path_factory.mktemp("exports") / "shapes"
    assert main([f"--workdir={run}", f"--output={folder}"]) == 0
    return folder


def images(where):
    return TextToImage.load(where, rows_at_once=2, mesh=make_mesh(data=1)).generate("a green star", n=2)


# -- addresses ----------------------------------------------------------------------------------------------------


def test_addresses():
    parsed = module.parse("hf://owner/name@refs%2Fpr%2F1/a/b.bin")
    assert parsed == module.Address("owner/name", "refs/pr/1", "a/b.bin")
    assert module.parse("hf://owner/name") == module.Address("owner/name")
    assert module.parse("hf://o-1/n.2@v1") == module.Address("o-1/n.2", "v1")
    for wrong in (
        "hf://name",
        "hf://",
        "hf://a/b@",
        "hf://a/b/../c",
        "hf://a/b//c",
        "hf:/a/b",
        "hf://a b/c",
        "hf://../b",
    ):
        with pytest.raises(ConfigError, match="hf:"):
            module.parse(wrong)
    assert module.name_of("/x/hub/models--owner--name/snapshots/c0ffee") == "hf://owner/name@c0ffee"
    assert module.name_of("runs/prior") == "runs/prior"


# -- files --------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(hub):
    path = module.download_checked("hf://owner/weights/model.bin")
    assert pathlib.Path(path).read_bytes() == hub.files["owner/weights"]["model.bin"]
    assert module.download_checked("hf://owner/weights/model.bin") == path
    assert [request for request in hub.requests if request[0] == "GET"] == [
        ("GET", "/owner/weights/resolve/main/model.bin", None)
    ]
    assert COMMIT in path and module.download_checked(f"hf://owner/weights@{COMMIT}/model.bin") == path


def test_a_broken_download_is_resumed(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    hub.breaks = 2
    path = module.download_checked("hf://owner/weights/model.bin")
    assert pathlib.Path(path).read_bytes() == hub.files["owner/weights"]["model.bin"]
    ranges = [given for method, _, given in hub.requests if method == "GET"]
    assert ranges[0] is None and len(ranges) == 3 and ranges[1] == "bytes=2560-"


def test_a_missing_file_lists_those_that_exist(hub):
    with pytest.raises(HubError, match=r"model\.bin, notes\.txt"):
        module.download_checked("hf://owner/weights/wrong.bin")
    with pytest.raises(ConfigError, match=r"model\.bin, notes\.txt"):
        module.download_checked("hf://owner/weights")


def test_a_private_repository_needs_a_login(hub, monkeypatch):
    hub.private.add("owner/weights")
    with pytest.raises(HubError, match="HF_TOKEN"):
        module.download_checked("hf://owner/weights/model.bin")
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert module.download_checked("hf://owner/weights/model.bin")


def test_a_gated_repository_a_missing_one_and_a_missing_revision(hub):
    hub.gated.add("owner/weights")
    with pytest.raises(HubError, match="conditions"):
        module.download_checked("hf://owner/weights/model.bin")
    hub.gated.clear()
    with pytest.raises(HubError, match="owner/nothing"):
        module.download_checked("hf://owner/nothing/model.bin")
    with pytest.raises(HubError, match="v9"):
        module.download_checked("hf://owner/weights@v9/model.bin")


def test_without_a_network(hub, monkeypatch):
    path = module.download_checked("hf://owner/weights/model.bin")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = len(hub.requests)
    assert module.download_checked("hf://owner/weights/model.bin") == path
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        module.download_checked("hf://owner/weights/notes.txt")
    assert len(hub.requests) == count, "offline mode asks nobody"


def test_a_damaged_file_in_the_cache_is_named(hub):
    path = pathlib.Path(module.download_checked("hf://owner/weights/model.bin")).resolve()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(DamagedError, match="SHA-256"):
        module.download_checked("hf://owner/weights/model.bin")


def test_the_package_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"pip install.*hub"):
        module.download_checked("hf://owner/weights/model.bin")


# -- models -------------------------------------------------------------------------------------------------------


def test_an_export_is_pushed_and_loaded(hub, folder, tmp_path, monkeypatch, capsys):
    push = [f"--workdir={folder}", f"--output={tmp_path}/shapes", "--push=owner/shapes"]
    assert main(push) == 1 and "HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert main(push) == 0 and COMMIT in capsys.readouterr().out
    assert 'TextToImage.load("hf://owner/shapes")' in hub.files["owner/shapes"]["README.md"].decode()
    drawn = images("hf://owner/shapes")
    np.testing.assert_array_equal(drawn, images(str(folder)))
    count = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    downloaded._download.cache_clear()
    np.testing.assert_array_equal(images("hf://owner/shapes"), drawn)
    assert len(hub.requests) == count


def test_where_an_address_is_possible():
    names = "hf://owner/name,runs/a,hf://o/n@v1"
    assert evaluate.split_folders(names) == ["hf://owner/name", "runs/a", "hf://o/n@v1"]
    with pytest.raises(ConfigError, match="hf://owner/name"):
        expanded("hf://owner/name")


def test_a_repository_that_is_no_export(hub):
    with pytest.raises(HubError, match=r"dalle_jax\.export.*model\.bin"):
        TextToImage.load("hf://owner/weights")


def test_an_incomplete_repository(hub, folder):
    hub.add("owner/half", folder)
    del hub.files["owner/half"]["model.safetensors"]
    with pytest.raises(HubError, match=r"model\.safetensors"):
        TextToImage.load("hf://owner/half")


def test_published_weights_from_a_hub(hub, tmp_path, capsys):
    hub.files["owner/weights"]["model.bin"] = b"{}" * 600
    assert import_weights(["vqgan", "--weights=hf://owner/weights/model.bin", f"--output={tmp_path}/run"]) == 1
    assert "JSON" in capsys.readouterr().err
    assert import_weights(["vqgan", "--weights=hf://owner/weights/nothing.bin", f"--output={tmp_path}/run"]) == 1
    assert "notes.txt" in capsys.readouterr().err


def test_a_vocabulary_from_a_hub(hub, tmp_path, monkeypatch):
    hub.files["owner/weights"] |= {"model.bin": b"weights", "bpe.model": b"words"}
    read = []

    def run(files, output, settings):
        read.extend(pathlib.Path(file).read_bytes() for file in (*files, settings["vocabulary"]))

    one = dataclasses.replace(catalogue.IMPORTERS["rudalle-malevich"], run=run)
    monkeypatch.setitem(catalogue.IMPORTERS, one.name, one)
    files, settings = ["hf://owner/weights/model.bin"] * 2, {"vocabulary": "hf://owner/weights/bpe.model"}
    catalogue.import_files(one.name, files, f"{tmp_path}/run", settings)
    assert read == [b"weights", b"weights", b"words"]
