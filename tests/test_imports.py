"""Which package may import which, and what an import of the library may do.

The arrows are read from the source by `ast`, so that imports inside functions count too.
"""

import ast
import graphlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "dalle_jax"

# From top to bottom: each package may import every package of the levels below it, but no other package of its level.
LEVELS = (
    ("main", "runs"),
    ("demo",),
    ("jobs",),
    ("evaluation", "aot"),
    ("pretrained", "training", "export"),
    ("tasks", "text_to_image"),
    ("priors",),
    ("clip",),
    ("metrics", "checkpoints", "models"),
    ("image_tokenizers", "data", "reporting", "optim"),
    ("storage", "distributed", "configuration"),
    ("errors", "keys", "token_layout", "compilation_cache", "pytree"),
)
# `from dalle_jax import TextToImage, ClipScorer, train`: the public names of the library. Their import is lazy.
ROOT_IMPORTS = {"text_to_image", "jobs"}
TOP_MODULES = 8  # at most this many modules stand directly in the package


def source_files(root=ROOT):
    """Returns the path of each module of the package by its full name."""
    files = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imported_names(module, path):
    """Yields each dotted name that a module imports, with the line, wherever the import stands.

    A string that spells a module's full name counts as well, because `importlib` imports by such strings.
    """
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.startswith(f"{PACKAGE}."):
                yield node.value, node.lineno


def arrows(files):
    """Returns {module: {imported module: line}} for the modules of this package."""
    found = {}
    for module, path in files.items():
        found[module] = {}
        for name, line in imported_names(module, path):
            while name and name not in files:  # a class or function: its module is meant
                name = name.rpartition(".")[0]
            if name and name != module:
                found[module].setdefault(name, line)
    return found


def room(module):
    """Returns the package or top module that a module belongs to; "" for the root package."""
    return module.split(".")[1] if "." in module else ""


def allowed(importer, imported):
    """Whether the table has an arrow between two rooms."""
    if importer == imported:
        return True
    if importer == "":
        return imported in ROOT_IMPORTS
    level = {name: depth for depth, names in enumerate(LEVELS) for name in names}
    return imported in level and level[importer] < level[imported]


def wrong_arrows(files):
    return [
        f"{files[module].name}:{line}: {module} imports {name}"
        for module, names in arrows(files).items()
        for name, line in names.items()
        if not allowed(room(module), room(name))
    ]


def circle(files):
    """Returns the modules of an import circle in order; an empty list if there is none."""
    try:
        graphlib.TopologicalSorter(arrows(files)).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def test_the_table_names_each_package_once():
    rooms = sorted({room(module) for module in source_files()} - {""})
    assert rooms == sorted(name for names in LEVELS for name in names)


def test_packages_import_only_what_stands_below_them():
    assert wrong_arrows(source_files()) == []


def test_no_module_imports_itself_over_others():
    assert circle(source_files()) == []


@pytest.mark.parametrize(
    "line",
    [
        "import dalle_jax.training.step",
        "from dalle_jax.training.step import TrainState",
        "from dalle_jax.training import step",
        "from ..training import step",
        "def late():\n    from dalle_jax.training.step import TrainState",
        "JOBS = {'train': 'dalle_jax.training.step'}",
        "from dalle_jax import TextToImage",
    ],
)
def test_every_kind_of_import_is_seen(tmp_path, line):
    for name in ("", "training/", "data/"):
        (tmp_path / PACKAGE / name).mkdir()
        (tmp_path / PACKAGE / name / "__init__.py").touch()
    (tmp_path / PACKAGE / "training" / "step.py").write_text("from dalle_jax.data import pipeline\n")
    (tmp_path / PACKAGE / "data" / "pipeline.py").write_text("import numpy\n")
    assert not wrong_arrows(source_files(tmp_path)) and not circle(source_files(tmp_path))
    (tmp_path / PACKAGE / "data" / "pipeline.py").write_text(line)
    (wrong,) = wrong_arrows(source_files(tmp_path))
    assert wrong.startswith("pipeline.py:") and "dalle_jax.data.pipeline imports dalle_jax" in wrong
    if "TextToImage" not in line:
        assert sorted(set(circle(source_files(tmp_path)))) == ["dalle_jax.data.pipeline", "dalle_jax.training.step"]


def test_few_modules_stand_at_the_top():
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= TOP_MODULES


# Third-party modules are imported first, because their own side effects are not ours to forbid.
SIDE_EFFECTS = """
import importlib, json, logging, os, signal, sys, threading, warnings

sys.modules["torch"] = None  # tensorboardX would import it, which takes seconds
third_party, library = json.loads(sys.argv[1])
for name in third_party:
    importlib.import_module(name)

import fsspec
import jax
from absl import flags
from absl import logging as absl_logging
from jax._src import xla_bridge


def state():
    named = dict(logging.Logger.manager.loggerDict, root=logging.getLogger())
    loggers = {
        name: str((logger.level, logger.filters, logger.handlers, logger.propagate, logger.disabled))
        for name, logger in named.items()
        if isinstance(logger, logging.Logger) and (logger.filters or logger.handlers or logger.level)
    }
    return {
        "loggers": loggers,
        "absl's handler": str(absl_logging.get_absl_handler().filters),
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "module path": list(sys.path),
        "signals": {str(number): str(signal.getsignal(number)) for number in signal.valid_signals()},
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "warning filters": str(warnings.filters),
        "jax": {name: str(value) for name, value in jax.config.values.items()},
        "devices in use": xla_bridge.backends_are_initialized(),
        "fsspec": str(fsspec.config.conf),
        "flags": sorted(flags.FLAGS),
    }


before, changed = state(), {}
for name in library:
    importlib.import_module(name)
    now = state()
    if now != before:
        changed[name] = [key for key in now if now[key] != before[key]]
    before = now
print(json.dumps(changed))
"""


def test_an_import_has_no_side_effects():
    """Loggers, signals, flags, JAX's and fsspec's settings stay; no device is used. Only `main` defines flags."""
    files = source_files()
    names = {name for module, path in files.items() for name, _ in top_level_imports(module, path)}
    third_party = sorted(name for name in names if name.split(".")[0] not in {PACKAGE, *sys.stdlib_module_names})
    library = [module for module in graphlib.TopologicalSorter(arrows(files)).static_order() if room(module) != "main"]
    done = subprocess.run(
        [sys.executable, "-c", SIDE_EFFECTS, json.dumps([third_party, library])],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def top_level_imports(module, path):
    """Yields the modules imported when this module is imported, and the line."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module, node.lineno


def test_the_library_is_imported_without_jax():
    """`TextToImage` loads JAX when it is first used, so that `import dalle_jax` is quick."""
    program = "import sys, dalle_jax; assert 'jax' not in sys.modules and 'numpy' not in sys.modules; print('quick')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "quick\n", done.stderr
