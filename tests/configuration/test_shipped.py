"""The configs by name, from any directory: in a checkout, and in a package that was installed from a wheel."""

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from dalle_jax.configuration import config_files, shipped
from dalle_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py"))
SOURCES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "dalle_jax", "configs")


def test_names():
    assert shipped.names() == NAMES and {"prior", "quickstart", "generate"} <= set(NAMES)


@pytest.mark.parametrize("given", ["prior:emoji", "prior.py:emoji", "configs/prior.py:emoji"])
def test_every_spelling_from_another_folder(tmp_path, monkeypatch, given):
    monkeypatch.chdir(tmp_path)
    assert shipped.located(given) == f"{ROOT}/configs/prior.py:emoji"
    assert config_files.load(given).workdir == "runs/prior-emoji"
    assert (
        shipped.with_located(["main", f"--config={given}", "--config.steps=3"])[1]
        == f"--config={ROOT}/configs/prior.py:emoji"
    )
    assert shipped.with_located(["main", "--config", given])[2] == f"{ROOT}/configs/prior.py:emoji"


def test_your_own_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "prior.py").write_text("def get_config():\n    return {'mine': 1}\n")
    assert shipped.located("configs/prior.py") == "configs/prior.py"
    assert config_files.load_module("configs/prior.py").get_config() == {"mine": 1}
    assert shipped.located("prior") == f"{ROOT}/configs/prior.py", "a name without a suffix is a config of the package"
    for elsewhere in (f"{tmp_path}/prior.py", "other/prior", "nowhere", "nowhere.py", "", "configs"):
        assert shipped.located(elsewhere) == elsewhere


def test_your_own_file_can_build_on_the_configs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if pathlib.Path(place or ".").resolve() != ROOT])
    monkeypatch.delitem(sys.modules, "configs", raising=False)
    monkeypatch.delitem(sys.modules, "configs.prior", raising=False)
    (tmp_path / "mine.py").write_text("from configs import prior\nget_config = prior.get_config\n")
    before = list(sys.path)
    assert config_files.load("mine.py:small").variant == "small"
    assert sys.path == before


def test_an_unknown_name_lists_the_configs():
    with pytest.raises(ConfigError, match='did you mean "maskgit"') as raised:
        config_files.load("maskgti:small")
    assert all(name in str(raised.value) for name in NAMES)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package as a wheel installs it. The wheel is built from the source distribution."""
    pytest.importorskip("setuptools", "70.1", reason="setuptools builds the wheel")
    work = tmp_path_factory.mktemp("build")
    (work / "project").mkdir()
    for name in SOURCES:
        source, target = ROOT / name, work / "project" / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    build = "import setuptools.build_meta as b; b.build_{}('{}')"
    run = lambda kind, folder: subprocess.run(
        [sys.executable, "-c", build.format(kind, work)], cwd=folder, capture_output=True, text=True, check=True
    )
    run("sdist", work / "project")
    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        archive.extractall(work / "unpacked", filter="data")
    run("wheel", next((work / "unpacked").iterdir()))
    with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
        archive.extractall(work / "site")
    return work / "site"


def python(installed, folder, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


LOAD = """
import pathlib, dalle_jax
from dalle_jax.configuration import config_files, shipped
print(shipped.FOLDER.relative_to(pathlib.Path(dalle_jax.__file__).parent))
print(*shipped.names())
print(config_files.load("maskgit:small").workdir, config_files.load("configs/quickstart.py").maskgit.workdir)
"""


def test_a_wheel_holds_the_configs(installed, tmp_path):
    """Every spelling works outside of a checkout. All files of the package are there, and nothing else is installed."""
    held = {path.relative_to(ROOT) for path in (ROOT / "dalle_jax").rglob("*.*") if "__pycache__" not in path.parts}
    assert [str(path) for path in held if path.is_file() and not (installed / path).exists()] == []
    assert [path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")] == ["dalle_jax"]
    done = python(installed, tmp_path, "-c", LOAD)
    assert done.stdout.splitlines() == [
        "shipped/configs", " ".join(NAMES), "runs/maskgit-small runs/quickstart/maskgit",
    ], done.stderr  # fmt: skip
    done = python(installed, tmp_path, "-m", "dalle_jax.main", "--config=prior:small", "--config.steps=77", "--help")
    assert done.returncode == 0 and "  steps=77 " in done.stdout, done.stderr
