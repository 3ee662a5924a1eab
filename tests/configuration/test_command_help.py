"""`--help`: the config files, the variants of one, and the keys that people set."""

import os
import pathlib
import subprocess
import sys

import pytest

from dalle_jax.configuration import config_files
from dalle_jax.configuration.command_help import describe, overview, split
from dalle_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").glob("[!_]*.py"))


def run(*arguments, folder, packages=ROOT):
    """The command line in a process that works in `folder` and finds `dalle_jax` in `packages`."""
    environment = os.environ | {"PYTHONPATH": str(packages), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "dalle_jax.main", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def has(config, key):
    """Returns whether a configuration has a dotted key."""
    *parents, last = key.split(".")
    for name in parents:
        config = config.get(name, {})
    return last in config


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_variants_and_keys(file):
    module = config_files.load_module(file)
    variants = getattr(module, "VARIANTS", {})
    for variant, row in variants.items() or [("", {})]:
        given = f"{file}:{variant}".rstrip(":")
        text = describe(given, config_files.load(given))
        assert all(f"  {name} " in text and other["doc"] in text for name, other in variants.items())
        assert 7 <= len(module.KEYS) <= 18, "about a dozen"
        listed = {key for key, meaning in module.KEYS.items() if f"  {key}=" in text and meaning in text}
        missing = set(module.KEYS) - listed
        assert missing == {key for key in module.KEYS if not has(config_files.load(given), key)}
        assert not missing or pathlib.Path(file).name == "evaluate.py", "the one whose variants are two jobs"
        assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 150
        if variants:
            hardware_and_time = row["doc"].rpartition(";")[2]
            assert ", " in hardware_and_time, "the machine, and how long it takes there"


def test_values_and_all_keys():
    config = config_files.load(f"{ROOT}/configs/prior.py:emoji")
    config.steps = 77
    short, full = (describe("configs/prior.py:emoji", config, everything) for everything in (False, True))
    assert "  steps=77 " in short and "in emoji" in short and "anneal_start" not in short
    assert "model.anneal_start=0\n" in full and "tokenizer.optimizer.scales.encoder=0.02" in full
    assert "optimizer.scales={}" in full, "an empty section is listed too"


def test_a_config_without_a_table(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text('"""Mine."""\nfrom ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n')
    assert "Mine." in describe(str(path), config_files.load_module(path).get_config())


def test_overview(tmp_path):
    text = overview()
    assert all(f"  {file.stem} " in text for file in FILES) and "__init__" not in text
    assert f"folder {tmp_path}/configs" in overview(tmp_path / "configs")


def test_split():
    assert split(["main", "--config=a.py", "--help"]) == ("short", ["main", "--config=a.py"])
    assert split(["main", "--help=all", "--config.steps=3"]) == ("all", ["main", "--config.steps=3"])
    assert split(["main", "--config.help=1"]) == (None, ["main", "--config.help=1"])
    with pytest.raises(ConfigError, match="--help=everything"):
        split(["main", "--help=everything"])


def test_the_command_line(tmp_path):
    """Also from another directory, with a `dalle_jax` that lacks the configs."""
    (tmp_path / "dalle_jax").symlink_to(ROOT / "dalle_jax")
    arguments = (f"--config={ROOT}/configs/maskgit.py:3b", "--config.steps=77", "--help")
    done = run(*arguments, folder=tmp_path, packages=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  steps=77 " in done.stdout and "Muse" in done.stdout
    wrong = run("--config=configs/prior.py:papr", "--help", folder=ROOT)
    assert wrong.returncode == 2 and "papr" in wrong.stderr and not wrong.stdout
