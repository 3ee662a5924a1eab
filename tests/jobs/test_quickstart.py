"""Quickstart: all its stages are checked first, and its CLIP is frozen into the workdirs of the priors."""

import pathlib

import flax.linen as nn
import jax
import pytest

from dalle_jax.configuration import config_files
from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError
from dalle_jax.jobs import quickstart
from dalle_jax.jobs.quickstart import freeze_clip
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.text_to_image.clip_scorer import ClipScorer


def test_a_clip_that_was_trained_longer_replaces_the_frozen_one(tmp_path):
    text = TextModel.train(["a red circle above a blue square"] * 9, 30, tmp_path / "model")
    sizes = dict(image_size=16, patch=8, image_width=8, image_depth=1, image_heads=1, embed_dim=4)
    sizes |= dict(text_width=8, text_depth=1, text_heads=1, text_length=9)
    clip = CLIP(CLIPOptions(text_vocab=text.vocab_size + 1, end_id=text.vocab_size, **sizes))
    params = nn.meta.unbox(jax.jit(clip.init)(jax.random.key(0)))
    early = ClipScorer(clip, params, text)
    late = ClipScorer(clip, jax.tree.map(lambda x: x + 1, params), text)
    workdir = tmp_path / "prior"

    def written():
        return {path.name: path.stat().st_mtime_ns for path in (workdir / "clip").iterdir()}

    freeze_clip(early, str(workdir))
    assert ClipScorer.load(workdir).fingerprint() == early.fingerprint()
    before = written()
    freeze_clip(early, str(workdir))
    assert written() == before, "the same CLIP is not written again"
    freeze_clip(late, str(workdir))
    assert ClipScorer.load(workdir).fingerprint() == late.fingerprint() != early.fingerprint()


WRONG = [
    ("prior.tokenizer.model.hidden", 7),
    ("prior.tokenizer.objective.init", "luck"),
    ("prior.model.trunk.heads", 3),
    ("maskgit.model.steps", 0),
    ("maskgit.seed", -1),
    ("clip.model.patch", 5),
    ("clip.text.length", 0),
    ("evaluate.captions", "no"),
    ("evaluate.count", 0),
    ("evaluate.rows_at_once", 0),
    ("evaluate.sampling.temperature", -1.0),
    ("evaluate.metrics.candidates", -1),
    ("maskgit_sampling.top_k", 0),
]


@pytest.mark.parametrize("key, value", WRONG, ids=[key for key, _ in WRONG])
def test_wrong_values_of_all_stages_are_found_first(trained, tmp_path, tmp_path_factory, key, value):
    config = config_files.load(str(pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"))
    config.lock()
    for name in ("prior", "maskgit", "clip"):
        config[name].data.data_dir = str(tmp_path_factory.getbasetemp() / "shapes")
        config[name].data.builder_kwargs.num_train = 64
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=key.rpartition(".")[2]):
        quickstart.run(config, str(tmp_path / "run"))
    assert not trained
