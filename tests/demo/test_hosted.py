"""experiments/demo: the Dockerfile's steps fit the package, and app.py serves without paths of the host.

No container is built here.
"""

import ast
import json
import os
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import demo_runs
import pytest
import quick_xla
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "demo"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
STEPS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]


def of(step):
    return [rest for name, rest in STEPS if name == step]


def setup_argument(name):
    """The value of a literal argument of setup(), or the keys of a dict."""
    call = next(
        node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    )  # fmt: skip
    value = next(keyword.value for keyword in call.keywords if keyword.arg == name)
    return {key.value for key in value.keys} if isinstance(value, ast.Dict) else ast.literal_eval(value)


def test_the_image_has_a_python_that_the_package_supports():
    (base,) = of("FROM")
    version = re.fullmatch(r"python:(3\.\d+)-slim", base)[1]
    assert version in SpecifierSet(setup_argument("python_requires"))


def test_the_extras_exist():
    extras = re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE)
    assert len(extras) == 2 and set(",".join(extras).split(",")) <= setup_argument("extras_require")


def test_all_that_is_copied_exists_and_is_enough_to_install():
    copied = {name for rest in of("COPY") for name in rest.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    read = re.findall(r'HERE / "([^"]+)"', (ROOT / "setup.py").read_text())
    assert read and set(read) | {"setup.py", "pyproject.toml", "dalle_jax"} <= copied


def test_the_command_is_a_copied_file_on_the_exposed_port():
    (command,), (port,) = of("CMD"), of("EXPOSE")
    program = json.loads(command)
    assert program[0] == "python" and f"experiments/demo/app.py {program[1]}" in of("COPY")
    assert f"PORT={port}" in of("ENV")[0] and f'"PORT", "{port}"' in (FOLDER / "app.py").read_text()


def environment(**given):
    return {**os.environ, "XLA_FLAGS": quick_xla.flags(), "PYTHONPATH": str(ROOT), **given}


def test_runs_are_asked_for():
    done = subprocess.run(
        [sys.executable, FOLDER / "app.py"], env=environment(RUNS=""), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "RUNS" in done.stderr


def test_app_serves_without_paths(tmp_path):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install -e '.[demo]'")
    runs = demo_runs.write(tmp_path / "private")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, FOLDER / "app.py"], env=environment(RUNS=" ".join(runs), PORT=str(port)),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        lines = [""]
        while "The page is at" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], "".join(lines)
        address = f"http://127.0.0.1:{port}/"
        texts = [urllib.request.urlopen(address + name).read().decode() for name in ("", "page/about", "config")]
        about = json.loads(texts[1])
        assert [run["name"] for run in about["runs"]] == ["maskgit", "prior"]
        assert not any("private" in text or str(tmp_path) in text for text in texts)
    finally:
        process.terminate()
        process.communicate(timeout=30)
