"""Workdirs of runs that were never trained: random parameters in real checkpoints, written in a second."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp

from dalle_jax.checkpoints import workdir as workdirs
from dalle_jax.checkpoints.checkpoints import Checkpoints
from dalle_jax.checkpoints.compatibility import to_json
from dalle_jax.configuration import config_files
from dalle_jax.data.text import TextModel
from dalle_jax.image_tokenizers import tokenizer as tokenizers
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.priors import registry
from dalle_jax.priors.condition import Text
from dalle_jax.pytree import fingerprint
from dalle_jax.storage import checksummed
from dalle_jax.text_to_image.clip_scorer import ClipScorer
from dalle_jax.token_layout import TokenLayout

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
CAPTIONS = ["a red circle above a blue square", "a green star"] * 9
STEP = 7


class Place:
    """The place in data that is never read."""

    def get_state(self):
        return {"next": 0}


def config_of(name, model=(), **trunk):
    """configs/NAME at tiny sizes: images of 16 pixels, 4×4 tokens of 24 codes. `model` holds options of a prior."""
    config = config_files.load(f"{CONFIGS}/{name}")
    config.data.image_size, config.batch_size, config.steps = 16, 4, STEP
    config.mesh.data = 1
    if config.task == "prior":
        config.text.vocab_size, config.text.length = 40, 8
        config.model.update(dict(model))
        config.model.trunk.update({"width": 16, "depth": 2, "heads": 2, **trunk})
        config = config.copy_and_resolve_references()
        config.tokenizer.model.update(SMALL_DVAE)
    return config


SMALL_DVAE = dict(vocab_size=24, hidden=8, groups=1, blocks_per_group=1, codebook_dim=8, stem_factor=4)


def init(model, seed):
    """Random parameters, larger than at the start of a training, so that images differ visibly."""
    params = nn.meta.unbox(jax.jit(model.init)(jax.random.key(seed)))
    return jax.tree.map(lambda x: 4 * x, params)


def save(folder, config, params, frozen=None, metrics=None):
    """Writes config.json, one checkpoint, and a line of metrics.jsonl."""
    folder = pathlib.Path(folder)
    items = {"params": params, "rest": {"step": jnp.int32(STEP)}}
    with Checkpoints(str(folder), best_metric="image_nats") as checkpoints:
        checkpoints.save(STEP, items, Place(), config, metrics, frozen and fingerprint(frozen))
    checksummed.write_json(folder / "config.json", to_json(config))
    lines = {"step": STEP, **{f"eval/{name}": value for name, value in (metrics or {}).items()}}
    (folder / "metrics.jsonl").write_text(json.dumps(lines) + "\n")
    return str(folder)


def prior(folder, name="prior.py:shapes", seed=1, model=(), **trunk):
    """Writes the workdir of a prior with its tokenizer and text model; returns its path."""
    config = config_of(name, model, **trunk)
    workdirs_of = pathlib.Path(folder)
    text = TextModel.train(CAPTIONS, 40, workdirs_of / "text" / "sentencepiece.model")
    tokenizer = tokenizers.of_training(config.tokenizer)
    params = init(tokenizer, 0)
    workdirs.save_tokenizer(folder, tokenizer, params)
    layout = TokenLayout(Text(text.vocab_size, 8), tokenizer.vocab_size, *tokenizer.grid(16))
    made = registry.make(config.prior, config.model, layout)
    return save(folder, config, init(made, seed), {"tokenizer": params}, {"image_nats": 1.25})


def image_tokenizer(folder, **model):
    """Writes the workdir of a dVAE's training; returns its path."""
    config = config_of("dvae.py:shapes")
    config.model.update({**SMALL_DVAE, **model})
    return save(folder, config, init(tokenizers.of_training(config), 2), metrics={"psnr": 21.0})


def clip():
    """A CLIP with random parameters for images of 16 pixels."""
    text = TextModel.train(CAPTIONS, 40)
    options = CLIPOptions(
        image_size=16, patch=8, image_width=16, image_depth=1, image_heads=2, text_width=16, text_depth=1,
        text_heads=2, embed_dim=8, text_length=9, text_vocab=text.vocab_size + 1, end_id=text.vocab_size,
    )  # fmt: skip
    return ClipScorer(CLIP(options), init(CLIP(options), 3), text)
