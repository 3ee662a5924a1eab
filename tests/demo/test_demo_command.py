"""`python -m dalle_jax.demo`: its messages before a page is started."""

import subprocess
import sys
from pathlib import Path

import pytest

from dalle_jax.demo import __main__ as command
from dalle_jax.demo import server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)


def test_gradio_is_asked_for_before_a_model_is_loaded(without_gradio, capsys):
    assert command.main(["no/such/run"]) == 2
    assert "[demo]" in capsys.readouterr().err


@pytest.mark.parametrize("argv, token", [(["no/such/run"], "no/such/run"), (["run", "--queue=0"], "--queue")])
def test_wrong_arguments(argv, token, monkeypatch, capsys):
    monkeypatch.setattr(command, "require_gradio", lambda: None)
    assert command.main(argv) in (1, 2)
    assert token in capsys.readouterr().err


def test_the_page_listens_on_this_machine_only_and_is_not_shared():
    given = command._parser().parse_args(["run"])
    assert given.host == "127.0.0.1" and given.share is False


@pytest.mark.parametrize(
    "argv, hosted", [([], False), (["--host=localhost"], False), (["--host=0.0.0.0"], True), (["--share"], True)]
)
def test_visitors_from_elsewhere_see_no_paths(argv, hosted, monkeypatch):
    seen = []
    monkeypatch.setattr(command, "require_gradio", lambda: None)
    monkeypatch.setattr(command, "load", lambda *given: seen.append(given[-1]))
    monkeypatch.setattr(command, "serve", lambda *given: None)
    assert command.main(["run", *argv]) == 0 and seen == [hosted]


@pytest.mark.parametrize("run, place", [("hf://owner/name", "hf://owner/name"), ("/srv/prior", None)])
def test_manifests_name_a_run_on_a_hub_by_its_address(run, place, monkeypatch):
    monkeypatch.setattr(command.TextToImage, "load", lambda *given: None)
    monkeypatch.setattr(command, "check_draws_captions", lambda model: None)
    assert command.load([run]).places.get(run.rpartition("/")[2]) == place


def test_the_package_is_imported_without_gradio():
    modules = [f"dalle_jax.demo.{path.stem}" for path in Path(server.__file__).parent.glob("*.py")]
    program = "import importlib, sys\nsys.modules['gradio'] = None\nfor n in sys.argv[1:]: importlib.import_module(n)"
    command = [sys.executable, "-c", program, *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_file_of_the_page_is_installed():
    """setup.py lists the kinds of files that the page consists of."""
    setup = (ROOT / "setup.py").read_text()
    kinds = {path.suffix for path in server.PAGE.iterdir()}
    assert kinds == {".html", ".css", ".js", ".svg"} and '"page/*"' in setup
