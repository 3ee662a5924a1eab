"""Times the dVAE: images to tokens (argmax included), tokens to images, and one training step.

All cases use random weights and float32.

| case           | model                                  | images  | batch |
|----------------|----------------------------------------|---------|-------|
| encode, decode | full size                              | 256x256 | 1, 4  |
| encode, decode | small                                  | 64x64   | 16    |
| train          | small, without and with stem           | 64x64   | 16    |

The training step is that of a training: ELBO with its logged metrics, AdamW. The stem is the space-to-depth stem of the
small configs.
"""

import sys

import _measure as m  # first: it limits the threads
import _training
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dalle_jax.image_tokenizers.dvae import DVAEOptions, DVAETokenizer
from dalle_jax.tasks.dvae import DVAETask

FULL = dict(hidden=256, blocks_per_group=2, vocab_size=8192)
SMALL = dict(hidden=64, blocks_per_group=1, vocab_size=512)
STEM = SMALL | dict(groups=3, stem_factor=2)
SMOKE = dict(hidden=8, blocks_per_group=1, vocab_size=32)


def build(sizes: dict, size: int, batch: int, smoke: bool) -> tuple[DVAETokenizer, np.ndarray, dict]:
    """Returns the tokenizer, images uint8 [B, size, size, 3], and the field "shape" of the line."""
    sizes, size, batch = (sizes | SMOKE, 16, min(batch, 2)) if smoke else (sizes, size, batch)
    options = DVAEOptions(image_size=size, **sizes)
    images = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    shape = {"image": size, "tokens": list(options.grid(size)), "batch": batch, "groups": options.groups, **sizes}
    return DVAETokenizer(options), images, shape | {"dtype": options.dtype}


def infer(kind: str, sizes: dict, size: int, batch: int, default_runs: int, runs: int, smoke: bool) -> dict:
    tokenizer, images, shape = build(sizes, size, batch, smoke)
    # Only the parameters of this half, because the compared implementations also build only one half.
    parts = ("encoder",) if kind == "encode" else ("codebook", "decoder")
    init = jax.jit(lambda key: {part: nn.meta.unbox(tokenizer.init(key))[part] for part in parts})
    params = init(jax.random.key(0))
    tokens = np.random.default_rng(1).integers(0, tokenizer.vocab_size, (len(images), *shape["tokens"]), np.int32)
    given = jnp.asarray(images if kind == "encode" else tokens)
    program, compile_s = m.compiled(jax.jit(getattr(tokenizer, kind)), params, given)
    line = m.measure(lambda: program(params, given), runs or default_runs)
    per_s = round(len(images) / line["median_ms"] * 1e3, 3)
    return line | {"compile_s": round(compile_s, 2), "images_per_s": per_s, "params": m.count(params), "shape": shape}


def train(sizes: dict, size: int, batch: int, default_runs: int, runs: int, smoke: bool) -> dict:
    tokenizer, images, shape = build(sizes, size, batch, smoke)
    task = DVAETask(tokenizer, optax.constant_schedule(0.9), optax.constant_schedule(0.0))
    line = _training.time_step(task, {"image": images}, task.schedules, runs or default_runs, inner=1 if smoke else 5)
    return line | {"images_per_s": round(len(images) / line["median_ms"] * 1e3, 2), "shape": shape}


def inference(*args):
    return lambda runs, smoke: infer(*args, runs, smoke)


def training(*args):
    return lambda runs, smoke: train(*args, runs, smoke)


CASES = {
    "encode_256_b1": inference("encode", FULL, 256, 1, 5),
    "decode_256_b1": inference("decode", FULL, 256, 1, 5),
    "encode_256_b4": inference("encode", FULL, 256, 4, 3),
    "decode_256_b4": inference("decode", FULL, 256, 4, 3),
    "encode_small_64_b16": inference("encode", SMALL, 64, 16, 7),
    "decode_small_64_b16": inference("decode", SMALL, 64, 16, 7),
    "train_small_64_b16": training(SMALL, 64, 16, 5),
    "train_stem_64_b16": training(STEM, 64, 16, 5),
}

if __name__ == "__main__":
    sys.exit(m.main(__file__, CASES))
