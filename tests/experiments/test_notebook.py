"""experiments/notebooks/colab.ipynb: its committed state, and a run of all its cells."""

import ast
import copy
import fnmatch
import importlib.metadata
import io
import pathlib
import re
import shutil
import sys
import types
import zipfile

import jax  # noqa: F401  imported before the tests replace google.colab, which jax looks for
import nbformat
import numpy as np
import pytest
import quick_xla
import tiny_copies
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from PIL import Image

from dalle_jax.configuration import config_files
from dalle_jax.configuration.options import from_config
from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.reporting.images import save_png

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "experiments" / "notebooks" / "colab.ipynb"

STEPS = {
    "steps": 2,
    "cadence.eval": 2,
    "cadence.preview": 2,
    "cadence.checkpoint": 2,
    "eval_batches": 1,
    "batch_size": 4,
}
FEW_SHAPES = {"data.builder_kwargs.num_train": 512}
DVAE = {"model.vocab_size": 32, "model.hidden": 96, "model.codebook_dim": 96, "model.blocks_per_group": 1}
TRUNK = {"model.trunk.width": 16, "model.trunk.depth": 3, "model.trunk.heads": 2}
TEXT = {"text.length": 16, "text.vocab_size": 300}
TOWERS = {f"model.{t}_{size}": n for t in ("image", "text") for size, n in (("width", 16), ("depth", 1), ("heads", 2))}


def under(prefix, changes):
    return {f"{prefix}.{key}": value for key, value in changes.items()}


TINY = {
    "INSTALL": False,
    "QUICKSTART": {
        **under("prior.tokenizer", {**STEPS, **DVAE, **FEW_SHAPES}),
        **under("prior", {**STEPS, **TRUNK, **TEXT, **FEW_SHAPES}),
        **under("maskgit", {**STEPS, **TRUNK, **TEXT, **FEW_SHAPES}),
        **under("clip", {**STEPS, **TOWERS, **TEXT, **FEW_SHAPES}),
        **{"evaluate.count": 8, "evaluate.rows_at_once": 4, "evaluate.metrics.candidates": 2},
    },
    "TOKENIZER": {**STEPS, **DVAE},
    "PRIOR": {**STEPS, **TRUNK, **TEXT},
    "MASKGIT": {**STEPS, **TRUNK, **TEXT},
    "CLIP": {**STEPS, **TOWERS, **TEXT},
}


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def cells(notebook, tag):
    """Returns the code cells with a tag."""
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def parameters(notebook):
    (cell,) = cells(notebook, "parameters")
    values = {}
    exec(cell.source, values)
    return {name: value for name, value in values.items() if name.isupper()}


def test_is_a_notebook_without_outputs(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source
            assert set(cell.metadata) <= {"tags"}, "a run leaves other metadata"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert NOTEBOOK.read_text().endswith("}\n") and "file:/" not in NOTEBOOK.read_text()


def test_every_cell_compiles(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            compile(TransformerManager().transform_cell(cell.source), cell.id, "exec")


def test_parameters(notebook):
    values = parameters(notebook)
    assert set(TINY) <= set(values), "the run below changes these"
    assert "OWNER" in values["REPOSITORY"] and values["INSTALL"] and values["DRIVE"] == "/content/drive"
    assert all(not values[name] for name in ("IMAGES", "UPLOAD", "CAPTIONS", *TINY) if name != "INSTALL")
    assert notebook.cells[1] is cells(notebook, "parameters")[0], "the parameters come first"


def helper(notebook):
    """Returns the notebook's function `load`."""
    (cell,) = cells(notebook, "helpers")
    names = {"config_files": config_files}
    exec(cell.source[cell.source.index("def load(") : cell.source.index("def train(")], names)
    return names["load"]


def test_names_and_keys_of_configs_exist(notebook, monkeypatch):
    """All configs that the notebook loads, at both values of SIZES, with the changes of the run below."""
    monkeypatch.chdir(ROOT)
    load, source = helper(notebook), "\n".join(cell.source for cell in notebook.cells)
    load("quickstart.py", TINY["QUICKSTART"])
    assert '"quickstart.py"' in source
    for sizes in ("emoji", "folder"):
        for name, changes in (("prior.py", "PRIOR"), ("maskgit.py", "MASKGIT"), ("clip.py", "CLIP")):
            assert f'"{name}"' in source
            config = load(f"{name}:{sizes}", TINY[changes])
            assert config.steps == 2
            if name == "prior.py":
                config.update_from_flattened_dict(under("tokenizer", TINY["TOKENIZER"]))
    with pytest.raises(KeyError, match="stepps"):
        load("prior.py:folder", {"stepps": 1})
    for example in re.findall(r"`PRIOR = (\{.*?\})`", source):
        load("prior.py:emoji", ast.literal_eval(example))


real_version = importlib.metadata.version


def run_cells(notebook, tag, space):
    """Runs the cells with a tag in a namespace, and returns the namespace."""
    for cell in cells(notebook, tag):
        exec(compile(TransformerManager().transform_cell(cell.source), tag, "exec"), space)
    return space


@pytest.fixture
def space(notebook, tmp_path, monkeypatch):
    """The names that the cell of images needs, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    names = {
        "COLAB": False,
        "RUNS": tmp_path / "runs",
        "pathlib": pathlib,
        "np": np,
        "Image": Image,
        "save_png": save_png,
    }
    return parameters(notebook) | names


def test_sample_images(notebook, space, tmp_path):
    """Without your images, sample images are drawn. The notebook asks for the combinations that were left out."""
    made = run_cells(notebook, "images", space)
    source = FolderSource(tmp_path / made["IMAGES"])
    captions, asked = [source[i]["captions"][0] for i in range(len(source))], made["CAPTIONS"]
    assert len(set(captions)) == len(captions) == 64 and len(asked) == 4
    assert not set(asked) & set(captions)
    assert set(" ".join(asked).split()) <= set(" ".join(captions).split()), "their words are known"
    images = np.stack([source[i]["image"] for i in range(64)])
    assert images.shape == (64, 64, 64, 3) and len({image.tobytes() for image in images}) == 64


def test_images_of_a_folder_are_unchanged(notebook, space, tmp_path):
    made = run_cells(notebook, "images", space | {"IMAGES": "somewhere"})
    assert made["IMAGES"] == "somewhere" and made["CAPTIONS"] == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("top", ["", "cats/"])
def test_uploaded_images(notebook, space, monkeypatch, top):
    """A .zip with a folder around the files and the additions of macOS. The upload is asked for once."""
    zipped, asked = io.BytesIO(), []
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(f"{top}cat.txt", "a cat")
        archive.writestr(f"{top}cat.png", tiny_copies.image(1, kind="PNG"))
        archive.writestr(f"__MACOSX/{top}._cat.png", b"no image")
    files = types.SimpleNamespace(upload=lambda: asked.append(1) or {"cats.zip": zipped.getvalue()})
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(files=files))
    for _ in range(2):
        made = run_cells(notebook, "images", dict(space) | {"COLAB": True, "UPLOAD": True})
        source = FolderSource(made["IMAGES"])
        assert len(source) == 1 and source[0]["captions"] == ["a cat"]
    assert asked == [1]


def test_trainings_are_saved_on_drive(notebook, space, monkeypatch, tmp_path):
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab", types.SimpleNamespace(drive=drive))
    names = {"RUNS": "kept", "EXTRA": ""}
    made = run_cells(notebook, "where", space | names | {"COLAB": True, "DRIVE": str(tmp_path / "drive")})
    assert made["RUNS"] == tmp_path / "drive/MyDrive/kept" and made["RUNS"].is_dir()
    assert mounted == [str(tmp_path / "drive")]
    made = run_cells(notebook, "where", space | names | {"COLAB": True, "DRIVE": ""})
    assert made["RUNS"] == pathlib.Path("kept") and len(mounted) == 1, "Drive is not mounted with an empty DRIVE"


@pytest.mark.parametrize(
    "devices, extra", [(["/dev/accel0"], "[tpu]"), (["/dev/vfio/0"], "[tpu]"), (["/dev/nvidia0"], "[cuda]"), ([], "")]
)
def test_install(notebook, space, monkeypatch, tmp_path, devices, extra):
    """The extra depends on the runtime. An existing clone is not cloned again."""
    ran = []

    def run(command, check):
        ran.append(command[command.index("-m") + 1 :] if "-m" in command else command)
        if "clone" in command:
            (tmp_path / "dalle_jax/configs").mkdir(parents=True)
            (tmp_path / "dalle_jax/configs/quickstart.py").touch()

    monkeypatch.setattr("subprocess.run", run)
    monkeypatch.setattr("glob.glob", lambda pattern: [d for d in devices if fnmatch.fnmatch(d, pattern)])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ValueError, match="REPOSITORY"):
        run_cells(notebook, "install", dict(space))
    address = {"REPOSITORY": "https://host/dalle_jax.git"}
    clone = ["git", "clone", "--quiet", address["REPOSITORY"], "dalle_jax"]
    install = ["pip", "install", "--quiet", "--editable", f".{extra}"]
    made = run_cells(notebook, "install", space | address)
    assert ran == [clone, install] and made["EXTRA"] == extra and not made["COLAB"]
    assert pathlib.Path.cwd() == tmp_path / "dalle_jax" and sys.path[0] == str(tmp_path / "dalle_jax")
    run_cells(notebook, "install", space | address)
    assert ran[2:] == [install], "run again in the same session"
    monkeypatch.chdir(tmp_path)
    run_cells(notebook, "install", space | address)
    assert ran[3:] == [install] and pathlib.Path.cwd() == tmp_path / "dalle_jax", "after a restart of the session"
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0.0" if name == "numpy" else real_version(name))
    with pytest.raises(RuntimeError, match="numpy"):
        run_cells(notebook, "install", space | address)


def test_both_sizes_load_their_variant(notebook, tmp_path, monkeypatch):
    """`SIZES = "folder"` trains `configs/prior.py:folder` on the small copies."""
    monkeypatch.chdir(ROOT)
    (cell,) = [cell for cell in cells(notebook, "train") if "def on_my_images" in cell.source]
    code = cell.source[: cell.source.index("\n\nmine = ")]
    load = helper(notebook)
    for sizes in ("folder", "emoji"):
        made = {"load": load, "SIZES": sizes, "IMAGE_SIZE": 64, "small": tmp_path}
        exec(code, made)
        config = made["on_my_images"]("prior.py", {"tokenizer.steps": 5})
        plain = load(f"prior.py:{sizes}", {})
        assert config.model == plain.model and config.steps == plain.steps and config.tokenizer.steps == 5
        for section in (config.data, config.tokenizer.data):
            options = from_config(DataOptions, section, "data")
            assert (options.source, options.path, options.image_size) == ("folder", str(tmp_path), 64)
        assert made["on_my_images"]("clip.py", {}).data.path == str(tmp_path)


def test_every_section_says_how_long_it_takes(notebook):
    """And the first image comes from the stored weights, before the first training."""
    words = ("second", "minute", "days")
    for before, cell in zip(notebook.cells, notebook.cells[1:]):
        if cell.cell_type == "code" and before.cell_type == "markdown" and "parameters" not in cell.metadata.tags:
            assert any(word in before.source for word in words), before.source
    first, quickstart = (notebook.cells.index(cells(notebook, tag)[0]) for tag in ("first", "quickstart"))
    assert first < quickstart and (ROOT / "experiments/results/weights/shapes/export.json").exists()
    assert "experiments/results/weights/shapes" in notebook.cells[first].source


@pytest.mark.slow
def test_runs(notebook, tmp_path):
    """Runs every cell at tiny sizes in a fresh kernel at the repository's root, like *Run all*."""
    notebook = copy.deepcopy(notebook)
    (first,) = cells(notebook, "parameters")
    changes = {**TINY, "RUNS": str(tmp_path / "kept"), "NAME": tmp_path.name}
    given = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in changes.items()))
    notebook.cells.insert(notebook.cells.index(first) + 1, given)
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("XLA_FLAGS", quick_xla.flags())  # one device, as on Colab
        environment.setenv("PYTHONWARNINGS", "default")
        try:
            client.execute()
        finally:
            shutil.rmtree(ROOT / "runs" / f"{tmp_path.name}_32_images", ignore_errors=True)

    def images(tag):
        outputs = [output for cell in cells(notebook, tag) for output in cell.outputs]
        return sum("image/png" in output.get("data", {}) for output in outputs)

    assert [images(tag) for tag in ("first", "quickstart", "generate", "edit", "prepare", "preview")] == [
        1,
        3,
        2,
        2,
        1,
        2,
    ]
    (report_cell,) = cells(notebook, "quickstart")
    assert any("<iframe srcdoc=" in output.get("data", {}).get("text/html", "") for output in report_cell.outputs)
    said = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "Traceback" not in said and "Warning" not in said, said
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert kept == {f"{tmp_path.name}_32", "quickstart"}
