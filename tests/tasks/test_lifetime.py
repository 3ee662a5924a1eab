"""Tasks and their frozen arrays are freed after use, and equal models share compiled programs."""

import gc
import weakref

import flax.linen as nn
import jax
import numpy as np
import pytest

from dalle_jax.data.text import TextModel
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.optim import schedules
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.tasks import prior as prior_task
from dalle_jax.tasks.clip import CLIPTask
from dalle_jax.tasks.dvae import DVAETask
from dalle_jax.tasks.prior import PriorTask
from dalle_jax.token_layout import TokenLayout

SIZES = dict(image_size=16, vocab_size=24, hidden=8, groups=1, blocks_per_group=1, codebook_dim=8, stem_factor=4)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    captions = ["a red circle above a blue square", "a green star"] * 9
    return TextModel.train(captions, 40, tmp_path_factory.mktemp("text") / "model")


def fresh(model, key=0):
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(key)))


def dvae_task(text_model):
    return DVAETask(DVAETokenizer(DVAEOptions(**SIZES)), schedules.Constant(0.5), schedules.Constant(1.0))


def prior_of(text_model):
    trunk = TransformerOptions(width=16, depth=1, heads=2, dtype="float32")
    return MaskGITPrior(TokenLayout(Text(text_model.vocab_size, 6), 24, 4, 4), MaskGITOptions(trunk, steps=2))


def make_prior_task(text_model):
    tokenizer = DVAETokenizer(DVAEOptions(**SIZES))
    return PriorTask(prior_of(text_model), tokenizer, fresh(tokenizer), text_model, preview_rows=2)


def clip_task(text_model):
    options = CLIPOptions(
        image_size=16, patch=8, image_width=16, image_depth=1, image_heads=2, text_width=16, text_depth=1,
        text_heads=2, embed_dim=8, text_length=7, text_vocab=text_model.vocab_size + 1, end_id=text_model.vocab_size,
    )  # fmt: skip
    return CLIPTask(CLIP(options), text_model)


def batch(text_model, rows=4):
    captions = Text(text_model.vocab_size, 6)
    text = np.stack([captions.pad(text_model.encode("a green star", max_length=6)[0])] * rows)
    images = np.random.default_rng(0).integers(0, 256, (rows, 16, 16, 3), np.uint8)
    return {"image": images, "text": text, "valid": np.ones(rows, bool)}


def use(task, made):
    params = fresh(task)
    task.evaluate(params, task.frozen, [made], jax.random.key(0))
    task.preview(params, task.frozen, made, jax.random.key(0))


@pytest.mark.parametrize("make", [dvae_task, make_prior_task, clip_task])
def test_a_used_task_and_its_frozen_arrays_are_freed(make, text_model):
    task = make(text_model)
    use(task, batch(text_model))
    held = [weakref.ref(task), *map(weakref.ref, jax.tree.leaves(task.frozen))]
    del task
    gc.collect()
    assert [ref() for ref in held] == [None] * len(held)


def test_equal_tasks_share_compiled_programs(text_model):
    made = batch(text_model)
    use(make_prior_task(text_model), made)
    functions = prior_task._measure, prior_task._decode
    before = [function._cache_size() for function in functions]
    use(make_prior_task(text_model), made)
    assert [function._cache_size() for function in functions] == before


def test_the_preview_of_a_prior_is_compiled(text_model, monkeypatch):
    task, seen = make_prior_task(text_model), []
    encode, decode = DVAETokenizer.encode, DVAETokenizer.decode
    spy = lambda method: lambda *args: (seen.append(isinstance(args[-1], jax.core.Tracer)), method(*args))[1]  # noqa: E731
    monkeypatch.setattr(DVAETokenizer, "encode", spy(encode))
    monkeypatch.setattr(DVAETokenizer, "decode", spy(decode))
    jax.clear_caches()
    task.preview(fresh(task), task.frozen, batch(text_model), jax.random.key(0))
    assert seen and all(seen)
