"""`ClipScorer`: loaded from a workdir, frozen into a folder and back, in batches of one size; and its errors."""

import json

import jax
import numpy as np
import pytest
import tiny_job
from best_checkpoint import with_a_worse_checkpoint
from PIL import Image

from dalle_jax.clip.stored import has_clip
from dalle_jax.errors import CheckpointError, ConfigError, DataError
from dalle_jax.tasks.clip import CLIPTask
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.training.loop import train

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "white": (250, 250, 250)}
CAPTIONS = [f"a {name} image" for name in COLORS]
MODEL = {
    "patch": 8, "image_width": 32, "image_depth": 1, "image_heads": 2, "text_width": 32, "text_depth": 1,
    "text_heads": 2, "embed_dim": 16, "activation": "gelu", "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """The workdir of a short training on plain images and their colours."""
    data = tmp_path_factory.mktemp("data")
    for i, (name, color) in enumerate(COLORS.items()):
        Image.fromarray(np.full((16, 16, 3), color, np.uint8)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"a {name} image")
    config = tiny_job.tiny_config(batch_size=4, steps=40, eval_batches=1)
    config.update({"task": "clip", "ema": {"decay": 0.0, "every": 1}})
    config.cadence.update({"eval": 0, "preview": 0, "checkpoint": 40, "log": 40})  # the task's own test covers these
    config.schedules.learning_rate.value = 3e-3
    del config["model"], config["data"], config["text"]
    config.model, config.text = MODEL, {"vocab_size": 40, "length": 8, "path": None}
    config.data = {"source": "folder", "path": str(data), "image_size": 16, "train_split": "all", "eval_split": "all"}
    folder = str(tmp_path_factory.mktemp("runs") / "clip")
    train(config, folder)
    return folder


@pytest.fixture(scope="module")
def scorer(workdir):
    return ClipScorer.load(workdir, rows_at_once=3)


def plain_images(*names, side=16):
    return np.stack([np.full((side, side, 3), COLORS[name], np.uint8) for name in names])


def test_a_loaded_training_distinguishes_colours(scorer):
    similarity = scorer.image_features(plain_images(*COLORS)) @ scorer.text_features(CAPTIONS).T
    assert (similarity.argmax(1) == np.arange(4)).all()
    scores = scorer.score(plain_images("red", "green", "red"), ["a green image"] * 3)
    assert scores.shape == (3,) and scores.dtype == np.float32 and scores.argmax() == 1 and np.abs(scores).max() <= 1
    np.testing.assert_allclose(scores, similarity[[0, 1, 0], 1], atol=1e-5)


def test_images_of_another_size_are_resized(scorer):
    small, large = scorer.image_features(plain_images("red")), scorer.image_features(plain_images("red", side=40))
    np.testing.assert_allclose(small, large, atol=1e-4)


def test_repr_is_short(scorer):
    text = repr(scorer)
    assert len(text) < 300 and "16 x 16" in text and "embedding of 16" in text


def test_scores_do_not_depend_on_the_batch(scorer, workdir):
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
    captions = [f"a {name} image" for name in [*COLORS, "red", "blue", "red"]]
    whole = ClipScorer.load(workdir, rows_at_once=8)
    np.testing.assert_allclose(scorer.score(images, captions), whole.score(images, captions), atol=1e-5)
    np.testing.assert_allclose(
        [scorer.score(images[i : i + 1], captions[i : i + 1])[0] for i in range(7)],
        scorer.score(images, captions),
        atol=1e-5,
    )
    assert scorer.image_features(images[:0]).shape == (0, 16)


def test_a_string_is_one_caption(scorer):
    images = plain_images("red", "green", "blue")
    expected = scorer.score(images, ["a red image"] * 3)
    np.testing.assert_array_equal(scorer.score(images, "a red image"), expected)
    np.testing.assert_array_equal(scorer.score(images[0], "a red image"), expected[:1])
    np.testing.assert_array_equal(scorer.text_features("a red image"), scorer.text_features(["a red image"]))


def test_images_of_every_kind(scorer, tmp_path):
    """A list may mix sizes. A score does not depend on the other images."""
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    large = np.random.default_rng(1).integers(0, 256, (24, 30, 3), np.uint8)
    expected = scorer.image_features(images)
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    kinds = [
        tmp_path / "a.png",
        Image.fromarray(images[0]),
        images[0] / 255,
        images[0].transpose(2, 0, 1),
        large,
        images[1],
    ]
    found = scorer.image_features(kinds)
    np.testing.assert_allclose(found[[0, 1, 2, 3, 5]], expected[[0, 0, 0, 0, 1]], atol=1e-6)
    np.testing.assert_allclose(found[4], scorer.image_features(large[None])[0], atol=1e-6)
    assert np.abs(found[4] - found[0]).max() > 1e-3
    np.testing.assert_allclose(scorer.image_features(images.transpose(0, 3, 1, 2)), expected, atol=1e-6)


def test_frozen_into_a_folder_and_back(scorer, tmp_path):
    assert not has_clip(tmp_path)
    scorer.save(tmp_path)
    assert has_clip(tmp_path)
    again = ClipScorer.load(tmp_path, rows_at_once=3)
    assert again.clip.options == scorer.clip.options
    jax.tree.map(np.testing.assert_array_equal, again.params, scorer.params)
    np.testing.assert_array_equal(
        again.score(plain_images("red", "blue"), CAPTIONS[:2]), scorer.score(plain_images("red", "blue"), CAPTIONS[:2])
    )


def test_invalid_images_and_captions_are_rejected(scorer):
    with pytest.raises(DataError, match="2 .* 1 "):
        scorer.score(plain_images("red", "blue"), ["a red image"])
    with pytest.raises(DataError, match="'  '"):
        scorer.score(plain_images("red"), ["  "])
    with pytest.raises(DataError, match="float64"):
        scorer.image_features(np.full((1, 16, 16, 3), 2.0))
    with pytest.raises(DataError, match="(?i)caption"):
        scorer.text_features([])
    for captions in (b"a red image", None, 5, [None], [b"a"]):
        with pytest.raises(DataError, match="string"):
            scorer.score(plain_images("red"), captions)
    with pytest.raises(ConfigError, match="path"):
        scorer.save(None)
    for images in (None, "nowhere.png", np.zeros((1, 16, 16, 2), np.uint8), plain_images("red") - 200.0):
        with pytest.raises(DataError):
            scorer.score(images, "a red image")


def test_invalid_folders_are_rejected(scorer, tmp_path):
    with pytest.raises(CheckpointError, match="config.json"):
        ClipScorer.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"task": "dvae", "data": {"image_size": 16}, "model": {}}))
    with pytest.raises(CheckpointError, match="'dvae'"):
        ClipScorer.load(tmp_path)
    scorer.save(tmp_path)
    options = json.loads((tmp_path / "clip" / "options.json").read_text())
    del options["checksums"]  # of another version, not damaged
    (tmp_path / "clip" / "options.json").write_text(json.dumps({**options, "embed_dim": 8}))
    with pytest.raises(CheckpointError, match="projection/kernel"):
        ClipScorer.load(tmp_path)
    (tmp_path / "clip" / "options.json").write_text(json.dumps({**options, "widht": 8}))
    with pytest.raises(ConfigError, match="widht"):
        ClipScorer.load(tmp_path)
    (tmp_path / "clip" / "options.json").write_text(json.dumps({**options, "text_model": "words"}))
    with pytest.raises(CheckpointError, match="'words'"):
        ClipScorer.load(tmp_path)


def test_the_best_checkpoint(scorer, workdir, tmp_path):
    """`best` is the one with the lowest metric of CLIP's task, which is not the latest here."""
    with_a_worse_checkpoint(workdir, tmp_path / "clip_run", CLIPTask.best_metric)
    chosen = ClipScorer.load(str(tmp_path / "clip_run"), step="best")
    assert chosen.fingerprint() == scorer.fingerprint()
    assert chosen.fingerprint() != ClipScorer.load(str(tmp_path / "clip_run")).fingerprint()
