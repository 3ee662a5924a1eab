"""experiments/linear_probe.py: planted labels are found in the layer that holds them, and nowhere else."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import untrained_run
from PIL import Image

from dalle_jax.errors import DataError

PATH = Path(__file__).parents[2] / "experiments" / "linear_probe.py"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def linear_probe():
    spec = importlib.util.spec_from_file_location("linear_probe", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["linear_probe"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


def examples(module, count):
    """Random features of two layers; the second one holds the colour, and none of them the size."""
    colors, sizes = (RNG.choice(values, count).tolist() for values in (["red", "blue"], ["small", "large"]))
    features = RNG.normal(size=(count, 2, 6)).astype(np.float32)
    features[:, 1, 3] += 6 * (np.array(colors) == "red")
    sizes[0] = None
    return module.Examples(features, {"color": colors, "size": sizes, "kind": ["one"] * count})


def test_a_planted_attribute_is_found_in_its_layer_alone(linear_probe):
    curves = linear_probe.probe(examples(linear_probe, 300), examples(linear_probe, 300))
    assert curves.keys() == {"color", "size"}  # one class is no question
    first, second = curves["color"]["accuracy"]
    assert second > 0.97 and abs(first - 0.5) < 0.12 and abs(curves["color"]["chance"] - 0.5) < 0.12
    assert max(abs(x - 0.5) for x in curves["size"]["accuracy"]) < 0.12
    assert linear_probe.mean_curve(curves)[1] > 0.7
    assert "| color | 0." in linear_probe.text_table(curves)


def test_images_without_labels_are_an_error(linear_probe):
    lacking = linear_probe.Examples(np.zeros((20, 2, 3), np.float32), {"class": [None] * 20})
    with pytest.raises(DataError, match="0 training"):
        linear_probe.probe(lacking, lacking)


def test_a_workdir_and_class_folders_give_a_table_and_a_plot(linear_probe, tmp_path, monkeypatch, capsys):
    """Embeddings of a random CLIP already know which images are red."""
    for split, count in (("train", 12), ("val", 6)):
        for name, color in (("red", (220, 30, 30)), ("blue", (30, 60, 220))):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(color) + RNG.integers(-20, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    untrained_run.clip().save(tmp_path / "clip")
    given = {"workdir": tmp_path / "clip", "path": tmp_path / "data", "output": tmp_path / "out", "train": 20}
    monkeypatch.setattr(sys, "argv", ["", *(f"--{name}={value}" for name, value in given.items()), "--untrained"])
    linear_probe.main()
    assert "| class | 0.500 | 1.000 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "probes.json").read_text())
    assert [model["untrained"] for model in found["models"].values()] == [False, True]
    with Image.open(tmp_path / "out" / "probes.png") as drawn:
        assert drawn.width > 300
