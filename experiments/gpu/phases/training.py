"""Training steps: model FLOPs of the step divided by its time."""

from __future__ import annotations

import _training
import models
import numpy as np
import optax
from _prior import PrecomputedTokens
from recorder import Recorder, memory_gib

from dalle_jax.aot import model_flops
from dalle_jax.models.clip import CLIP, CLIPOptions
from dalle_jax.tasks.clip import CLIPTask
from dalle_jax.tasks.dvae import DVAETask


def run(record: Recorder) -> None:
    tiny = record.tiny

    def rows(count: int) -> int:
        return 2 if tiny else count

    record.run([
        ("autoregressive 1B", 25, lambda: _prior(models.autoregressive(tiny), rows(16))),
        ("maskgit 24x768, 16x16", 15, lambda: _prior(models.maskgit(tiny, 16), rows(128))),
        ("maskgit 24x768, 32x32", 15, lambda: _prior(models.maskgit(tiny, 32), rows(32))),
        ("maskgit 24x768, 32x32, attention in XLA", 15,
         lambda: _prior(models.maskgit(tiny, 32, attention_kernel="xla"), rows(32))),
        ("dvae paper, 256 pixels", 20, lambda: _dvae(tiny, rows(32))),
        ("clip ViT-B/32", 15, lambda: _clip(tiny, rows(512))),
        ("autoregressive 1B, dense", 25, lambda: _prior(models.autoregressive(tiny, attention="full"), rows(16))),
    ])  # fmt: skip


def _prior(prior, rows: int) -> dict:
    batch = {
        "text": np.asarray(models.random_text(prior, rows)),
        "tokens": np.asarray(models.random_tokens(prior, rows)),
    }
    line = _timed(PrecomputedTokens(prior), batch, {}, 3 * rows * model_flops.prior(prior))
    return line | {"rows": rows, "remat": prior.options.trunk.remat}


def _dvae(tiny: bool, rows: int) -> dict:
    tokenizer = models.dvae(tiny, 256)
    task = DVAETask(tokenizer, optax.constant_schedule(0.9), optax.constant_schedule(6.6))
    batch = {"image": _images(rows, tokenizer.image_size)}
    return _timed(task, batch, task.schedules, model_flops.training(task, batch)) | {"rows": rows}


def _clip(tiny: bool, rows: int) -> dict:
    small = dict(image_size=32, patch=16, image_width=16, image_depth=1, image_heads=2, text_width=16, text_depth=1,
                 text_heads=2, embed_dim=8, text_length=8, text_vocab=64, end_id=63) if tiny else {}  # fmt: skip
    options = CLIPOptions(**{"dtype": "bfloat16", **small})
    # The model adds the end token.
    text = np.random.default_rng(0).integers(0, options.end_id, (rows, options.text_length - 1), np.int32)
    task, batch = CLIPTask(CLIP(options), None), {"image": _images(rows, options.image_size), "text": text}
    return _timed(task, batch, {}, model_flops.training(task, batch)) | {"rows": rows}


def _images(rows: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (rows, side, side, 3), np.uint8)


def _timed(task, batch: dict, schedules: dict, flops: float) -> dict:
    line = _training.time_step(task, batch, schedules, runs=5, warmup=2)
    passed = line["median_ms"] / 1e3
    fields = ("compile_s", "program_temporaries_mb", "params", "first_loss", "last_loss")
    return (
        {"seconds": passed, "model_tflops_per_s": flops / passed / 1e12}
        | {name: line[name] for name in fields}
        | {"peak_gib": memory_gib()}
    )
