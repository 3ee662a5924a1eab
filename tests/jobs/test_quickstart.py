"""The CLIP that quickstart freezes into the workdirs of the priors."""

import flax.linen as nn
import jax

from dalle_jax.data.text import TextModel
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
