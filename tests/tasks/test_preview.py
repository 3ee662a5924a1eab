"""Previews and metrics of every task with one, two or five held-out images."""

import functools
import json
import math

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from dalle_jax.data.sources.open import open_source
from dalle_jax.data.sources.source import DataOptions
from dalle_jax.data.text import TextModel
from dalle_jax.errors import ConfigError
from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.optim import schedules
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.reporting.images import to_uint8
from dalle_jax.tasks.clip import CLIPTask
from dalle_jax.tasks.dvae import DVAETask
from dalle_jax.tasks.preview import own_captions, preview_grid, shown_rows
from dalle_jax.tasks.prior import PriorTask
from dalle_jax.tasks.task import make_job
from dalle_jax.token_layout import TokenLayout

SIZES = dict(image_size=16, vocab_size=24, hidden=8, groups=1, blocks_per_group=1, codebook_dim=8, stem_factor=4)
TRUNK = TransformerOptions(width=16, depth=1, heads=2, dtype="float32")
CAPTIONS = [f"a {color} square" for color in ("red", "green", "blue", "pink", "grey")]


@functools.cache
def text_model():
    return TextModel.train(CAPTIONS * 9, 60)


@functools.cache
def layout():
    return TokenLayout(Text(text_model().vocab_size, 8), 24, 4, 4)


def fresh(model):
    return nn.meta.unbox(jax.jit(model.init)(jax.random.key(0)))


def dvae():
    return DVAETask(DVAETokenizer(DVAEOptions(**SIZES)), schedules.Constant(0.5), schedules.Constant(1.0))


def prior(kind):
    tokenizer = DVAETokenizer(DVAEOptions(**SIZES))
    if kind == "maskgit":
        model = MaskGITPrior(layout(), MaskGITOptions(TRUNK, steps=2))
    else:
        model = AutoregressivePrior(layout(), AutoregressiveOptions(TRUNK, kernel=3))
    return PriorTask(model, tokenizer, fresh(tokenizer), text_model())


def clip():
    options = CLIPOptions(
        image_size=16, patch=8, image_width=16, image_depth=1, image_heads=2, text_width=16, text_depth=1,
        text_heads=2, embed_dim=8, text_length=9, text_vocab=text_model().vocab_size + 1,
        end_id=text_model().vocab_size,
    )  # fmt: skip
    return CLIPTask(CLIP(options), text_model())


TASKS = {
    "dvae": dvae,
    "autoregressive": functools.partial(prior, "autoregressive"),
    "maskgit": functools.partial(prior, "maskgit"),
    "clip": clip,
}


class Config(dict):
    """The keys that `make_job` reads."""

    batch_size, seed = 8, 0


def job_of(task, folder, count):
    for i in range(count):
        image = np.full((16, 16, 3), 128 + 20 * i, np.uint8)
        image[4:12, 4:12, i % 3] = 255
        Image.fromarray(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(CAPTIONS[i])
    options = DataOptions(source="folder", path=str(folder), image_size=16, train_split="all", eval_split="all")
    text = (None, None) if isinstance(task, DVAETask) else (text_model(), layout().condition)
    return make_job(task, Config(), options, None, *text)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("name", TASKS)
def test_few_held_out_images(tmp_path, name, count):
    """No padding row is shown, no cell is black, and no metric is NaN."""
    task = TASKS[name]()
    job, params = job_of(task, tmp_path, count), fresh(task)
    metrics = task.evaluate(params, task.frozen, job.eval_batches(), jax.random.key(0))
    assert all(math.isfinite(value) for value in metrics.values()), metrics
    assert job.examples == job.held_out == count
    image = task.preview(params, task.frozen, job.preview_batch(), jax.random.key(0))
    assert not (image.reshape(-1, 3) == 0).all(1).any()
    rows = (image.shape[0] - 16 - 40) / 104
    assert round(rows) == min(count, 4 if "prior" in task.title else 5)
    said = task.in_words(metrics, count)
    assert said and all(" nan" not in line for line in said)


def test_a_finite_loss_hides_empty_ranges_only(tmp_path):
    """A model whose numbers are not finite still reports each metric."""
    task = TASKS["maskgit"]()
    job = job_of(task, tmp_path, 2)
    broken = jax.tree.map(lambda x: x * np.nan, fresh(task))
    metrics = task.evaluate(broken, task.frozen, job.eval_batches(), jax.random.key(0))
    assert math.isnan(metrics["loss"]) and math.isnan(metrics["image_nats"])
    json.dumps(metrics)


def test_rows_are_spread_over_the_valid_ones():
    valid = np.array([0, 1, 1, 1, 0, 1, 1, 0], bool)
    assert shown_rows(valid, 3).tolist() == [1, 3, 6] and shown_rows(valid, 9).tolist() == [1, 2, 3, 5, 6]
    assert shown_rows(~(valid | True), 3).tolist() == []


@pytest.mark.parametrize("kind", ["autoregressive", "maskgit"])
def test_your_own_captions_are_drawn_at_each_preview(tmp_path, kind):
    """Four samples of each, the same ones for the same parameters, whatever the batch holds."""
    usual = prior(kind)
    own = PriorTask(
        usual.prior,
        usual.tokenizer,
        usual.frozen["tokenizer"],
        text_model(),
        captions=["a red square", "a blue square"],
    )
    job, params = job_of(own, tmp_path, 2), fresh(own)
    batch = job.preview_batch()
    image = own.preview(params, own.frozen, batch, jax.random.key(0))
    assert round((image.shape[0] - 16 - 40) / 104) == 2 and round((image.shape[1] - 190 - 40) / 104) == 4
    again = own.preview(params, own.frozen, {**batch, "image": batch["image"] * 0}, jax.random.key(0))
    np.testing.assert_array_equal(again, image)
    assert (own.preview(params, own.frozen, batch, jax.random.key(1)) != image).any()


def test_captions_of_a_configuration():
    of = lambda text: own_captions(ConfigDict({"preview": {"captions": text}}))
    assert of(" a red circle | a star") == ["a red circle", "a star"]
    assert of("") == of(" ") == own_captions(ConfigDict({})) == []
    with pytest.raises(ConfigError, match="preview.captions"):
        of("a red circle||a star")


def test_captions_of_the_tokenizer_are_those_of_its_source(tmp_path):
    """The preview of a tokenizer has the prior's layout: the caption, the real image, the reconstruction."""
    job_of(dvae(), tmp_path, 3)
    held_out = open_source(DataOptions(source="folder", path=str(tmp_path), image_size=16), "all")
    task = DVAETask(dvae().tokenizer, schedules.Constant(0.5), schedules.Constant(1.0), held_out=held_out)
    job, params = job_of(task, tmp_path, 3), fresh(task)
    batch = job.preview_batch()
    image = task.preview(params, {}, batch, jax.random.key(0))
    real = batch["image"][:3]
    shown = to_uint8(task.tokenizer.decode(params, task.tokenizer.encode(params, real)))
    expected = preview_grid(CAPTIONS[:3], [("real", real), ("reconstructed", shown)])
    np.testing.assert_array_equal(image, expected)
    (tmp_path / "1.txt").write_text("")
    task.preview(params, {}, batch, jax.random.key(0))  # an image without a caption is shown too
