"""experiments/clipart_classes.py on a few files in place of the Debian package."""

import clipart_classes
import pytest


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Ten images of animals, in two sub-folders, and one of another kind."""
    for i in range(10):
        file = tmp_path / "png" / "animals" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(i))
    (tmp_path / "png" / "logos").mkdir()
    (tmp_path / "png" / "logos" / "x.png").write_text("x")
    monkeypatch.setattr(clipart_classes, "SOURCE", tmp_path / "png")


def contents(folder):
    return sorted(file.read_text() for file in folder.rglob("*.png"))


def test_held_out_images_are_in_no_training(source, tmp_path, capsys):
    out = tmp_path / "out"
    clipart_classes.main([f"--output={out}"])
    held_out, training = contents(out / "classes" / "val"), contents(out / "classes" / "train")
    assert len(held_out) == 2 and sorted(held_out + training) == [str(i) for i in range(10)]
    assert contents(out / "all") == sorted([*training, "x"])
    assert {path.name for path in (out / "classes").glob("*/*")} == {"animals"}
    assert "all: 9 images" in capsys.readouterr().out


def test_refused_calls(source, tmp_path, monkeypatch, capsys):
    for change, token in [((), "new folder"), (("SOURCE", tmp_path / "none"), "openclipart-png")]:
        if change:
            monkeypatch.setattr(clipart_classes, *change)
        with pytest.raises(SystemExit):
            clipart_classes.main([f"--output={tmp_path}"])
        assert token in capsys.readouterr().err
