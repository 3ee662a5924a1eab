"""The command line: dispatch, printed messages, and one clear line per error."""

import logging
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import pytest
from absl import flags

from dalle_jax import main as main_module
from dalle_jax.errors import CheckpointError, Preempted

# ml_collections reads config files by a function that importlib deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(
        textwrap.dedent("""
            from ml_collections import ConfigDict
            from dalle_jax.errors import ConfigError

            def get_config(variant="small"):
                if variant not in ("small", "large"):
                    raise ConfigError(f"a.py has no variant {variant!r}; it has: small, large.")
                return ConfigDict({"job": "train", "steps": 3, "workdir": "runs/a", "model": {"width": 3},
                                   "rate": 0.5, "fast": False, "tokenizer": {"steps": 3}})
        """)
    )
    return path


@pytest.fixture
def command(monkeypatch, config_file, capsys):
    """Returns a function that runs a command line in this process: (exit status, stderr, calls of the job)."""
    calls = []

    def run(*argv, job=lambda config, workdir: calls.append((config, workdir))):
        monkeypatch.setitem(sys.modules, "fake_job", types.SimpleNamespace(run=job))
        monkeypatch.setitem(main_module.JOBS, "train", "fake_job")
        monkeypatch.setattr(sys, "argv", ["main", *argv])
        flags.FLAGS.unparse_flags()
        for name in [name for name in flags.FLAGS if name.startswith("config.")]:
            delattr(flags.FLAGS, name)
        flags.FLAGS["config"].unparse()
        flags.FLAGS["workdir"].unparse()
        sys.modules.pop("config_config", None)  # otherwise names of the previous file would stay
        with pytest.raises(SystemExit) as stopped:
            main_module.main()
        return stopped.value.code or 0, capsys.readouterr().err, calls

    yield run
    flags.FLAGS.unparse_flags()


def test_dispatches_with_overrides(command, config_file):
    code, _, calls = command(f"--config={config_file}:large", "--config.model.width=7", "--workdir=here")
    ((config, workdir),) = calls
    assert code == 0 and workdir == "here" and config.model.width == 7 and config.steps == 3
    assert config.is_locked
    assert command(f"--config={config_file}")[2][-1][1] == "runs/a"


@pytest.mark.parametrize(
    "arguments, token",
    [
        (["--config=FILE", "--config.modle.width=3"], '"model"'),
        (["--config=FILE", "--config.model.widht=3"], "--config.model.widht=3"),
        (["--config=FILE", "--config.model.widht=3"], "'model.widht' (did you mean \"model.width\"?)"),
        (["--config=FILE", "--config.zzz=3"], "'zzz'"),
        (["--config=FILE", "--config.steps=abc"], "--config.steps=abc: expected a whole number"),
        (["--config=FILE", "--config.rate=abc"], "--config.rate=abc: expected a number"),
        (["--config=FILE", "--config.fast=abc"], "--config.fast=abc: expected true or false"),
        (["--config=FILE", "--config.model=3"], "--config.model=3: expected one of the keys"),
        (["--config=FILE", "--config.model=runs/a/b"], "--config.model=runs/a/b: expected one of the keys"),
        (["--config=FILE", "--config.tokenizer=/runs/a"], "--config.tokenizer_from=/runs/a"),
        (["--config=FILE", "--config.steps=many"], "--config.steps=many"),
        (["--config=FILE", "--config.job=dance"], "--config.job "),
        (["--config=FILE:dance"], "'dance'"),
        (["--config=FILE:huge"], "'huge'"),
        (["--config=configs/compile.py:paper"], "--config=configs/compile.py:paper"),
        (["--config=configs/__init__.py"], "get_config()"),
        (["--config=README.md"], "--config=README.md"),
        (["--config=nowhere.py"], "--config=nowhere.py"),
        (["--config=nowhere.py", "--config.steps=3"], "--config=nowhere.py"),
        (["--config=FILE", "extra"], "'extra'"),
        (["--wrkdir=x"], "workdir"),
        ([], "--config="),
    ],
)
def test_one_clear_line(command, config_file, arguments, token):
    code, error, calls = command(*(argument.replace("FILE", str(config_file)) for argument in arguments))
    assert code == 2 and not calls
    assert token in error and error.startswith("error: ") and error.count("\n") == 1


PACKAGE = pathlib.Path(main_module.__file__).parent


@pytest.mark.parametrize(
    "file, level, printed",
    [
        (PACKAGE / "training" / "loop.py", logging.INFO, True),
        (PACKAGE.parent / "experiments" / "pods.py", logging.INFO, False),
        ("/home/me/dalle_jax/.venv/lib/python3.12/site-packages/absl/app.py", logging.INFO, False),
        ("/home/me/dalle_jax/.venv/lib/python3.12/site-packages/absl/app.py", logging.WARNING, True),
        (PACKAGE.parent / "venv" / "lib" / "python3.12" / "site-packages" / "grain" / "a.py", logging.INFO, False),
    ],
)
def test_printed_log_records(file, level, printed):
    """Only this package's messages are printed below WARNING, wherever the virtual environment lies."""
    record = logging.LogRecord("absl", level, str(file), 1, "message", None, None)
    assert main_module._is_worth_reading(record) == printed


def test_only_the_first_host_prints_messages(monkeypatch):
    monkeypatch.setattr(main_module, "is_first", lambda: False)
    for level in (logging.INFO, logging.WARNING):
        record = logging.LogRecord("absl", level, str(PACKAGE / "keys.py"), 1, "message", None, None)
        assert main_module._is_worth_reading(record) == (level == logging.WARNING)


def test_errors_of_the_job(command, config_file):
    def fails(*_):
        raise CheckpointError("The disk is full.")

    code, error, _ = command(f"--config={config_file}", job=fails)
    assert (code, error) == (1, "error: The disk is full.\n")


def test_preempted(command, config_file):
    def stops(*_):
        raise Preempted("saved")

    assert command(f"--config={config_file}", job=stops)[0] == 0


def test_bugs_keep_their_traceback(command, config_file):
    def fails(*_):
        raise KeyError("a bug")

    with pytest.raises(KeyError, match="a bug"):
        command(f"--config={config_file}", job=fails)
    folder = config_file.parent / "absl_experiments"  # a folder of the user may be named like a library
    folder.mkdir()
    config_file = config_file.rename(folder / "a.py")
    config_file.write_text("x = {}['k']\n")
    with pytest.raises(KeyError, match="k"):
        command(f"--config={config_file}")
    config_file.write_text("def get_config():\n    return (lambda: get_config(3))()\n")
    with pytest.raises(flags.Error, match=r"get_config\(\) takes 0 positional"):
        command(f"--config={config_file}")  # the fault of the file


def test_a_real_process(config_file):
    root = os.path.dirname(os.path.dirname(__file__))
    command = [sys.executable, "-m", "dalle_jax.main", f"--config={config_file}", "--config.stps=4"]
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --config.stps=4: the configuration has no key 'stps' (did you mean \"steps\"?).\n"
