"""Every code block of README.md, CONTRIBUTING.md and docs/ runs, or says why the tests cannot run it.

A block that needs hardware or data that tests lack has `<!-- not run: REASON -->` in the line before it.

Three layers:
  - All commands, marked or not: the config, its variant, every key and every flag exist.
  - Python blocks: run with random models of the quickstart's sizes. `load` returns these models.
  - `pytest -m slow`: shell blocks run as a user runs them, at tiny sizes. Python blocks then load what these trained.
"""

import ast
import os
import re
import subprocess
import sys

import flax.linen as nn
import jax
import numpy as np
import pytest
import quick_xla
import short_runs
from absl import flags
from documents import CODE, DOCUMENTS, GUIDES, NOT_CODE, ROOT, blocks, commands, spans
from ml_collections import config_flags

import dalle_jax.main  # noqa: F401 (defines the command line's flags)
from dalle_jax import TextToImage
from dalle_jax.configuration import shipped
from dalle_jax.data.text import TextModel
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.pretrained import catalogue
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.token_layout import TokenLayout

BLOCKS = [block for path in GUIDES for block in blocks(path)]
SHELL = [block for block in BLOCKS if block.language == "sh"]
ELSEWHERE = [
    block for path in DOCUMENTS if path not in GUIDES for block in blocks(path)
]  # commands are checked, not run
MAIN = ["python", "-m", "dalle_jax.main"]

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads configs so


# -- every block -------------------------------------------------------------------------------------------------------


def test_every_block_is_run_or_marked():
    """The tests below run each unmarked block whose language is in `CODE`; no other language may hold code."""
    for block in BLOCKS + ELSEWHERE:
        assert block.language in CODE + NOT_CODE, f"{block}: give the block one of the languages {CODE + NOT_CODE}"
        assert block.mark or block not in ELSEWHERE, f"{block}: mark it `<!-- not run: … -->`"
        if block.language == "sh" and block.mark is None:
            for command in commands(block):
                assert _kind(command) in RUNNERS, f"{block}: no test runs {command[0]!r}; mark it `<!-- not run: … -->`"
        if block.language in NOT_CODE:
            assert block.mark is None, f"{block}: is not code, so it needs no mark"


def test_python_blocks_compile():
    for block in BLOCKS:
        if block.language == "python":
            compile(block.text, str(block), "exec")


# -- commands ----------------------------------------------------------------------------------------------------------


def _kind(command):
    if command[:3] == MAIN:
        return "main"
    if command[0] == "python" and command[1] == "-m":
        return "module"
    if command[0] == "python":
        return "script"
    return command[0]


def _load(arguments):
    """Parses `--config=…` and `--config.key=value` as the command line does; raises if one does not exist."""
    values, line = flags.FlagValues(), shipped.with_located(["main", *arguments])
    config = config_flags.DEFINE_config_file("config", lock_config=True, flag_values=values, sys_argv=line)
    values(line)
    return config.value


def check_main(command):
    """The config, the variant, the keys and the flags exist. So do the keys in the overrides of `compile.py`."""
    arguments = [word for word in command[3:] if not word.startswith("--help")]
    ours = [word for word in arguments if re.match(r"--config[.=]", word)]
    for word in set(arguments) - set(ours):
        assert re.match(r"--(\w+)=", word) and word[2:].partition("=")[0] in flags.FLAGS, f"there is no flag {word}"
    config = _load(ours)
    if config.job == "compile":
        overrides = [f"--config.{part}" for part in config.overrides.split(",") if part]
        _load([f"--config={config.target}", *overrides])


def check_script(command):
    _check_source(ROOT / command[1], command[2:], '"--{}"')


def check_module(command):
    if command[2] == "dalle_jax.pretrained":
        return check_importer(command[3], command[4:])
    file = ROOT / command[2].replace(".", "/")
    if file.is_dir():
        return _check_source(file / "__main__.py", command[3:], '"--{}"')
    _check_source(file.with_suffix(".py"), command[3:], '"{}"')


def check_importer(name, arguments):
    if name == "--list":
        return
    one = catalogue.IMPORTERS[name]
    written = [word.removeprefix("--").partition("=")[0] for word in arguments]
    assert set(written) <= {"weights", "output", *(setting.name for setting in one.settings)}
    assert written.count("weights") == len(one.files) and "output" in written


def _check_source(file, arguments, written):
    assert file.exists(), f"{file} does not exist"
    source = file.read_text()
    if "_measure" in source and file.name != "_measure.py":  # the benchmarks share their flags
        source += (file.parent / "_measure.py").read_text()
    for word in arguments:
        if word.startswith("--"):
            flag = word[2:].partition("=")[0]
            assert written.format(flag) in source, f"{file.name} has no flag --{flag}"


def check_pip(command):
    text = (ROOT / "setup.py").read_text()
    for extra in re.findall(r"\.\[(.*?)\]", " ".join(command)):
        for part in extra.split(","):
            assert f'"{part}":' in text, f"setup.py has no extra {part!r}"


def check_pytest(command):
    marks = re.findall(r'^    "(\w+):', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    if "-m" in command:
        assert command[command.index("-m") + 1] in marks
    for word in command[1:]:
        assert not word.startswith("tests/") or (ROOT / word).exists(), f"{word} does not exist"


CHECKS = {"main": check_main, "script": check_script, "module": check_module, "pip": check_pip, "pytest": check_pytest}


@pytest.mark.parametrize("block", SHELL + ELSEWHERE, ids=str)
def test_commands_exist(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(block):
        if _kind(command) in CHECKS:
            CHECKS[_kind(command)](command)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_inline_commands_and_keys_exist(path, monkeypatch, keys):
    """Inline code that begins with a command or with `--config.`; a key must exist in some config.

    Upper case stands for any key of a section.
    """
    monkeypatch.chdir(ROOT)
    for span in spans(path):
        words = span.split()
        if words[:3] == MAIN:
            check_main(words)
        elif words[0] == "pip":
            check_pip(span.replace("'", "").split())
        elif words[0].startswith("--config."):
            for word in words:
                key = re.sub(r"\.?[A-Z]+$", "", word.partition("=")[0].removeprefix("--config."))
                assert not key or key in keys, f"{path.name}: no config has the key {key!r} of `{span}`"
        elif re.match(r"configs/\w+\.py:\w", span):
            check_main([*MAIN, f"--config={words[0]}"])


@pytest.fixture(scope="module")
def keys():
    """Every dotted key of every config's default variant, and the sections."""
    found = set()
    for file in (ROOT / "configs").glob("*.py"):
        if "def get_config" in file.read_text():
            config = _load([f"--config={file}"])
            for path in _paths(config.to_dict()):
                found.add(path)
    return found


def _paths(section, prefix=""):
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _paths(value, f"{prefix}{key}.")


@pytest.mark.parametrize(
    "command",
    [
        "--config=configs/prior.py:no",
        "--config=configs/no.py",
        "--config=configs/prior.py --config.stepps=1",
        "--config=configs/prior.py --steps=1",
        "--config=configs/compile.py --config.target=configs/dvae.py --config.overrides=no.key=1",
    ],
)
def test_a_wrong_command_is_found(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, flags.Error, LookupError, AttributeError, ValueError, OSError)):
        check_main([*MAIN, *command.split()])


# -- Python blocks -----------------------------------------------------------------------------------------------------


def _run_python(path):
    """Runs the unmarked Python blocks of a document, one after the other, in one space of names."""
    names = {}
    for block in blocks(path):
        if block.language == "python" and block.mark is None:
            exec(compile(block.text, str(block), "exec"), names)
    return names


PYTHON = [path for path in GUIDES if any(block.language == "python" for block in blocks(path))]


@pytest.fixture(scope="module")
def random_models(tmp_path_factory):
    """Both priors with random weights and the sizes of the quickstart's data: 32 pixels, 8x8 tokens; and a CLIP."""
    file = tmp_path_factory.mktemp("text") / "model"
    text = TextModel.train(["a red circle above a blue square", "a green cross"] * 9, 40, file)
    dvae = DVAEOptions(
        image_size=32, vocab_size=16, hidden=8, groups=1, blocks_per_group=1, codebook_dim=8, stem_factor=4
    )
    tokenizer = DVAETokenizer(dvae)
    layout = TokenLayout(Text(text.vocab_size, 12), 16, 8, 8)
    trunk = TransformerOptions(width=8, depth=1, heads=2, dtype="float32", scan=False)
    sizes = {f"{tower}_{name}": n for tower in ("image", "text") for name, n in dict(width=8, depth=1, heads=2).items()}
    words = dict(text_length=13, text_vocab=text.vocab_size + 1, end_id=text.vocab_size)
    clip = CLIP(CLIPOptions(image_size=32, patch=16, embed_dim=8, dtype="float32", **words, **sizes))
    draw, rng = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), np.random.default_rng(0)
    init = lambda made: jax.tree.map(draw, nn.meta.unbox(jax.eval_shape(made.init, jax.random.key(0))))
    scorer = ClipScorer(clip, init(clip), text, rows_at_once=8)
    tokenizer_params = init(tokenizer)
    models = {}
    for name, prior in {
        "prior": AutoregressivePrior(layout, AutoregressiveOptions(trunk, attention="full")),
        "maskgit": MaskGITPrior(layout, MaskGITOptions(trunk, steps=2)),
    }.items():
        models[name] = TextToImage(
            prior, init(prior), tokenizer, tokenizer_params, text, 32, rows_at_once=8, scorer=scorer
        )
    return models


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_blocks_run(path, random_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    any_order = lambda workdir: any(word in str(workdir) for word in ("maskgit", "weights/shapes"))
    load = lambda workdir, *_, **__: random_models["maskgit" if any_order(workdir) else "prior"]
    monkeypatch.setattr(TextToImage, "load", load)
    monkeypatch.setattr(ClipScorer, "load", lambda *_, **__: random_models["prior"].scorer)
    _run_python(path)


# -- everything, as a user runs it -------------------------------------------------------------------------------------

_DVAE = [*short_runs.STEPS, *short_runs.PATCHES]
_VQ = [*short_runs.STEPS, *short_runs.SMALL_VQ]
_PRIOR = [*short_runs.STEPS, *short_runs.SHALLOW_TRUNK]
_LARGE_DVAE = [*short_runs.STEPS, *short_runs.SMALL_DVAE, "data.image_size=64", "data.workers=0"]
_LARGE_PRIOR = [*short_runs.STEPS, *short_runs.SMALL_TRUNK, "data.image_size=64", "data.workers=0", "ema.every=1"]
_CLIP = [*short_runs.STEPS, *short_runs.SMALL_CLIP]


def _tiny(command):
    """The overrides that shrink a command of `dalle_jax.main`; `DIR` becomes a folder of a few images."""
    file, variant = re.search(r"--config=(?:configs/)?(\w+)(?:\.py)?:?([\w.]*)", " ".join(command)).groups()
    under, few = short_runs.under, short_runs.FEW_SHAPES
    small = variant in ("", "shapes", "shape_classes", "emoji", "small")
    dvae, prior = (_DVAE, _PRIOR) if small else (_LARGE_DVAE, _LARGE_PRIOR)
    dvae = _VQ if variant == "small" else dvae
    data, best_of = [] if variant else few, ["metrics.candidates=2", "metrics.candidate_captions=2"]
    options = {
        "quickstart": [
            *under("prior.tokenizer.", _DVAE + few), *under("prior.", _PRIOR + few), *under("maskgit.", _PRIOR + few),
            *under("clip.", _CLIP + few), "evaluate.count=8", "evaluate.rows_at_once=8",
            "evaluate.metrics.candidates=2",
        ],
        "dvae": dvae + data,
        "prior": [*prior, *data, *under("tokenizer.", dvae + data)],
        "maskgit": [*prior, *data, *under("tokenizer.", dvae + data)],
        "clip": [*_CLIP, *data, *([] if small else ["data.image_size=64", "data.workers=0"])],
        "finetune": short_runs.STEPS,
        "data": [],
        "generate": ["rows_at_once=4"],
        "evaluate": ["rows_at_once=8", *(["count=24"] if variant == "imagenet" else ["count=8", *best_of])],
    }[file]  # fmt: skip
    return [word.replace("=DIR", "=images") for word in command] + under("--config.", options)


def _start(command, workspace):
    command = [sys.executable if word == "python" else word for word in command]
    environment = {**os.environ, "XLA_FLAGS": quick_xla.flags(), "PYTHONPATH": str(ROOT)}  # one device
    done = subprocess.run(command, cwd=workspace, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def run_main(command, workspace):
    _start(command if "--help" in command else _tiny(command), workspace)


def run_nothing(command, workspace):
    """Packages are installed already; `test_commands_exist` checks the extras."""


RUNNERS = {"main": run_main, "module": _start, "script": _start, "pip": run_nothing}


@pytest.mark.slow
def test_all_blocks_run_as_a_user_runs_them(tmp_path, monkeypatch):
    """The blocks of all documents in order, README first, in one folder."""
    for folder in ("configs", "experiments"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    short_runs.make_folder(tmp_path / "images", 64)
    for block in SHELL:
        if block.mark is None:
            for command in commands(block):
                RUNNERS[_kind(command)](command, tmp_path)
    monkeypatch.chdir(tmp_path)
    for path in PYTHON:
        _run_python(path)


def test_the_set_up_commands():
    """README names the two commands that every clone starts with."""
    written = [block.text.strip() for block in blocks(ROOT / "README.md") if block.language == "sh"]
    assert "pip install -e . && python -m dalle_jax.main --config=configs/quickstart.py" in written
    assert "pip install -e '.[test]' && pytest" in written


def test_python_blocks_import_what_exists():
    """Marked blocks too: every module and name that a block imports from the package is there."""
    for block in BLOCKS:
        if block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "dalle_jax":
                    exec(f"from {node.module} import {', '.join(alias.name for alias in node.names)}", {})
