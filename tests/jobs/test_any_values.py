"""Any value of any key: a command ends in one line before its work begins, or its configuration is accepted."""

import importlib
import random
import signal
import sys
import time
import types

import pytest
from absl import flags
from own_images import TINY_CLIP, TINY_DVAE, TINY_PRIOR, TINY_VQ, TINY_VQGAN

from dalle_jax import main as main_module
from dalle_jax.configuration import config_files

# ml_collections reads config files by a function that importlib deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = main_module.__file__.rpartition("/dalle_jax/")[0]
CPU_SECONDS = 5.0
HANGS = 20  # seconds, on a busy machine

# Configs with tiny sizes, which are traced quickly. PATH is a folder of captioned images.
_SHAPES = {"data.builder_kwargs.num_train": 8}
_OF_TOKENIZER = {f"tokenizer.{key}": value for key, value in TINY_VQ.items()}
CONFIGS = {
    "prior.py:small": {"data.path": "PATH", **TINY_PRIOR, **_OF_TOKENIZER},
    "maskgit.py:small": {"data.path": "PATH", **TINY_PRIOR, **_OF_TOKENIZER},
    "clip.py:small": {"data.path": "PATH", **TINY_CLIP},
    "clip.py:shapes": {**TINY_CLIP, **_SHAPES},
    "dvae.py:small": {"data.path": "PATH", **TINY_VQ},
    "dvae.py:folder": {"data.path": "PATH", "data.image_size": 32, **TINY_DVAE},
    "vqgan.py:small": {"data.path": "PATH", **TINY_VQGAN},
    "data.py:folder": {"data.path": "PATH"},
    "data.py:shapes": _SHAPES,
    "encode.py:folder": {"data.path": "PATH", "tokenizer_workdir": "no-tokenizer"},
    "generate.py": {"prompts": "a red circle"},
    "evaluate.py": {},
    "evaluate.py:coco": {"data.path": "PATH"},
    "compile.py": {"target": f"{ROOT}/configs/prior.py:small"},
    "compile.py:": {"target": f"{ROOT}/configs/dvae.py:small", "what": "sample"},
}
VALUES = {
    bool: ("nan", "-1", "2", "x", "()", "None"),
    int: ("nan", "inf", "-1", "0", "1", "3", "7", str(10**9), str(2**31), str(2**32), str(2**63), "x", "2.5", "None"),
    float: ("nan", "inf", "-inf", "-1", "0", "1", "2", "1e-45", "1e9", "1e39", str(2**63), "x", "()", "True", "None"),
    str: ("nan", "", "0", "x", "()", "None", "gs://no-such-bucket/x", "/dev/null", "a\nb", "no/such:1", "[5:2]"),
    tuple: ("()", "(-1,)", "(nan,)", "(1e9,)", "('x',)", "(None,)", "3", "None", "x", "(True,)"),
    types.NoneType: ("nan", "-1", "0", "x", "2.5", str(2**31), str(2**63), "()", "None", "True", "inf"),
    object: ("x", "{}", "()", "None", "0"),
}
CHOSEN = [
    ("prior.py:small", "text.length", str(10**8)),
    ("prior.py:small", "batch_size", str(10**9)),
    ("prior.py:small", "tokenizer.model.hidden", str(10**9)),
    ("prior.py:small", "model.trunk.dtype", "int8"),
    ("prior.py:small", "model.trunk.dtype", "float99"),
    ("prior.py:small", "model.trunk.depth", str(10**9)),
    ("prior.py:small", "model.trunk.dropout", "-1"),
    ("prior.py:small", "optimizer.b1", "2"),
    ("prior.py:small", "data.train_split", "train[5:2]"),
    ("prior.py:small", "workdir", "gs://no-such-bucket/x"),
    ("prior.py:small", "data_tokens", "gs://no-such-bucket/x"),
    ("prior.py:small", "data_tokens", "/dev/null"),
    ("encode.py:folder", "tokenizer_workdir", "gs://no-such-bucket/x"),
    ("encode.py:folder", "tokenizer_workdir", "/dev/null"),
    ("encode.py:folder", "data.image_size", "0"),
    ("encode.py:folder", "data.workers", str(10**9)),
    ("prior.py:small", "start_from", "gs://no-such-bucket/x"),
    ("prior.py:small", "job", "generate"),
    ("prior.py:small", "task", "clip"),
    ("clip.py:shapes", "data.builder_kwargs.num_train", str(2**31)),
    ("clip.py:shapes", "data.train_split", "train[5:2]"),
    ("clip.py:small", "negatives.spoiled", str(10**9)),
    ("dvae.py:folder", "model.groups", str(10**9)),
    ("vqgan.py:small", "discriminator.layers", str(10**9)),
    ("vqgan.py:small", "objective.lpips", "gs://no-such-bucket/x"),
    ("vqgan.py:small", "objective.perceptual_weight", "1"),
    ("generate.py", "sampling.guidance", "nan"),
    ("generate.py", "sampling.temperature", "nan"),
    ("generate.py", "sampling.steps", "2.5"),
    ("generate.py", "seed", str(2**32)),
    ("generate.py", "n", str(10**9)),
    ("evaluate.py", "metrics.blur", "(-1,)"),
    ("evaluate.py", "rows_at_once", "0"),
]  # fmt: skip
TOKENS = {"gs://no-such-bucket/x": "gs://", "train[5:2]": "5:2", "task": "model"}  # in place of the key's last part


def _keys(name):
    """Yields the keys of a config with the types of their values."""
    config = config_files.load(f"{ROOT}/configs/{name}")

    def leaves(section, prefix):
        for key in section:
            if hasattr(section[key], "to_dict") and len(section[key]):
                yield from leaves(section[key], f"{prefix}{key}.")
            else:
                yield prefix + key, section.get_type(key)

    yield from leaves(config, "")


def _cases(count):
    """Returns the chosen cases and random ones: config, key, value."""
    rng, cases = random.Random(0), list(CHOSEN)
    keys = {name: list(_keys(name)) for name in CONFIGS}
    while len(cases) < count:
        name = rng.choice(list(CONFIGS))
        key, kind = rng.choice(keys[name])
        cases.append((name, key, rng.choice(VALUES.get(kind, VALUES[object]))))
    return cases


@pytest.fixture
def command(monkeypatch, tmp_path, folder, capsys):
    """Returns a function that runs a command up to its work: exit status, stderr, CPU seconds."""
    monkeypatch.setenv("DALLE_JAX_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    for job, module in main_module.JOBS.items():
        module = importlib.import_module(module)
        check = module.run if job == "data" else module.check  # a look at data is short
        monkeypatch.setitem(sys.modules, f"only_checks_{job}", types.SimpleNamespace(run=check))
        monkeypatch.setitem(main_module.JOBS, job, f"only_checks_{job}")

    def run(name, key, value):
        sizes = {option: folder if size == "PATH" else size for option, size in CONFIGS[name].items()}
        options = {"workdir": "run", **sizes, key: value}
        argv = ["main", f"--config={ROOT}/configs/{name}", *(f"--config.{o}={v}" for o, v in options.items())]
        monkeypatch.setattr(sys, "argv", argv)
        flags.FLAGS.unparse_flags()
        for flag in [flag for flag in flags.FLAGS if flag.startswith("config.")]:
            delattr(flags.FLAGS, flag)
        flags.FLAGS["config"].unparse()
        flags.FLAGS["workdir"].unparse()
        sys.modules.pop("config_config", None)
        began = time.process_time()
        with pytest.raises(SystemExit) as stopped, _limited():
            main_module.main()
        return stopped.value.code or 0, capsys.readouterr().err, time.process_time() - began

    yield run
    flags.FLAGS.unparse_flags()


class _limited:
    """Ends a block that hangs."""

    def __enter__(self):
        signal.signal(signal.SIGALRM, self._end)
        signal.alarm(HANGS)

    def __exit__(self, *_):
        signal.alarm(0)

    def _end(self, *_):
        raise TimeoutError(f"hangs for {HANGS} s")


def _try(command, name, key, value):
    code, error, seconds = command(name, key, value)
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert code in (0, 1, 2)
    assert len(lines) == (code != 0), error
    assert "Traceback" not in error
    assert seconds < CPU_SECONDS


FEW, MANY = 60, 300


@pytest.mark.parametrize("name, key, value", _cases(FEW))
def test_one_line_or_accepted(command, name, key, value):
    _try(command, name, key, value)


@pytest.mark.slow
@pytest.mark.parametrize("name, key, value", _cases(MANY)[FEW:])
def test_many_more(command, name, key, value):
    _try(command, name, key, value)


@pytest.mark.parametrize("name, key, value", CHOSEN)
def test_chosen_values_are_rejected(command, name, key, value):
    code, error, _ = command(name, key, value)
    assert code in (1, 2) and (TOKENS.get(value) or TOKENS.get(key) or key.rpartition(".")[2]) in error
