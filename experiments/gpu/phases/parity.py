"""Differences between the accelerator and the CPU: losses, gradients, decoding, images, in float32 and bfloat16.

Also between the accelerator's own attention kernel and attention in XLA, in bfloat16 on the accelerator.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import models
import numpy as np
from recorder import Recorder

from dalle_jax.models.transformer_options import TransformerOptions
from dalle_jax.priors.autoregressive import AutoregressiveOptions, AutoregressivePrior
from dalle_jax.priors.condition import Text
from dalle_jax.priors.maskgit import MaskGITPrior
from dalle_jax.priors.maskgit_model import MaskGITOptions
from dalle_jax.token_layout import TokenLayout

LAYOUT = TokenLayout(Text(128, 16), image_vocab=256, height=8, width=8)
TRUNK = TransformerOptions(width=64, depth=4, heads=2, dtype="float32")
PRIORS = {
    "row, column, convolution": AutoregressivePrior(LAYOUT, AutoregressiveOptions(trunk=TRUNK, kernel=3)),
    "full causal": AutoregressivePrior(LAYOUT, AutoregressiveOptions(trunk=TRUNK, attention="full")),
    "bidirectional": MaskGITPrior(LAYOUT, MaskGITOptions(trunk=TRUNK)),
}
ROWS = 4
# 64 text tokens and 32x32 image tokens, with the heads of the measured models.
LARGE = TokenLayout(Text(128, 64), image_vocab=256, height=32, width=32)


def run(record: Recorder) -> None:
    cases = []
    for name, prior in PRIORS.items():
        for dtype, precision in (("float32", "highest"), ("float32", "default"), ("bfloat16", "default")):
            one = models.with_dtype(prior, dtype)
            cases.append((f"{name}, {dtype}, {precision} precision", 5, functools.partial(_prior, one, precision)))
    for name, prior in PRIORS.items():
        for size in (64, 128):
            large = _large(prior, size, record.tiny)
            cases.append((f"{name}, heads of {size}, kernel against XLA", 5, functools.partial(_kernels, large)))
    for dtype in ("float32", "bfloat16"):
        cases.append((f"dVAE, {dtype}", 5, functools.partial(_dvae, dtype)))
    record.run(cases)


def _large(prior, head_dim: int, tiny: bool):
    """Returns a prior of another size in bfloat16."""
    trunk = dataclasses.replace(TRUNK, width=4 * head_dim, heads=4, dtype="bfloat16")
    options = dataclasses.replace(prior.options, trunk=trunk)
    if isinstance(options, AutoregressiveOptions) and not tiny:
        options = dataclasses.replace(options, kernel=11)
    return type(prior)(LAYOUT if tiny else LARGE, options)


def _kernels(prior) -> dict:
    """Compares loss and gradients of the kernel "auto" with those of XLA, on the same device."""
    text, tokens = models.random_text(prior, ROWS), models.random_tokens(prior, ROWS)
    params, found = models.random_params(prior), []
    for kernel in ("auto", "xla"):
        trunk = dataclasses.replace(prior.options.trunk, attention_kernel=kernel)
        one = type(prior)(prior.layout, dataclasses.replace(prior.options, trunk=trunk))
        loss = functools.partial(_loss, one, text=text, tokens=tokens)
        found.append(jax.device_get(jax.jit(jax.value_and_grad(loss))(params)))
    return _differences(*found)


def _loss(prior, params, text, tokens):
    return prior.loss(params, text, tokens, jax.random.key(1), train=False)[0]


def _differences(ours: tuple, theirs: tuple) -> dict:
    """Returns the relative differences of a loss and of its gradients."""
    leaves = zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]))
    return {
        "loss": abs(float(ours[0] - theirs[0])) / abs(float(theirs[0])),
        "gradients": max(_difference(a, b) for a, b in leaves),
    }


def _prior(prior, precision: str) -> dict:
    text, tokens = models.random_text(prior, ROWS), models.random_tokens(prior, ROWS)
    params, keys = models.random_params(prior), jax.random.split(jax.random.key(2), ROWS)
    loss = functools.partial(_loss, prior, text=text, tokens=tokens)

    def values(params):
        value, gradients = jax.value_and_grad(loss)(params)
        return value, gradients, prior.sample(params, text, keys)

    with jax.default_matmul_precision(precision):
        device, host = _both(values, params)
    return _differences(device, host) | {"equal_tokens": float((device[2] == host[2]).mean())}


def _dvae(dtype: str) -> dict:
    tokenizer = models.dvae(True, 32, dtype)
    images = np.random.default_rng(0).integers(0, 256, (ROWS, 32, 32, 3), np.uint8)
    params = models.random_params(tokenizer)

    def values(params):
        tokens = tokenizer.encode(params, images)
        return tokens, tokenizer.decode(params, np.arange(ROWS * 16).reshape(ROWS, 4, 4) % tokenizer.vocab_size)

    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        device, host = _both(values, params)
    return {"equal_tokens": float((device[0] == host[0]).mean()), "pixels": float(np.abs(device[1] - host[1]).max())}


def _both(function, params) -> tuple:
    """Returns the function's values on the first device and on the CPU, as numpy arrays."""
    results = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
        with jax.default_device(device):
            moved = jax.device_put(params, device)
            results.append(jax.tree.map(np.asarray, jax.device_get(jax.jit(function)(moved))))
    return tuple(results)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest value."""
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-12))
