"""A training small enough for tests of the loop: a two-layer net on seeded random regression data."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from dalle_jax.distributed.mesh import make_mesh
from dalle_jax.distributed.rows import host_rows
from dalle_jax.distributed.sharding import constrain
from dalle_jax.tasks.task import Job

FEATURES, HIDDEN, TARGETS = 8, 16, 4


def tiny_config(**changes: Any) -> ConfigDict:
    """Returns a complete training configuration with `changes` by dotted name, with two underscores for each dot."""
    config = ConfigDict(
        {
            "job": "train",
            "task": "tiny",
            "variant": "tiny",
            "workdir": "",
            "seed": 0,
            "start_from": placeholder(str),
            "data": {"image_size": 8, "source": "random"},
            "text": {"vocab_size": 16, "length": 4},
            "model": {"hidden": HIDDEN, "remat": False},
            "objective": {},
            "optimizer": {"b1": 0.9, "b2": 0.95, "weight_decay": 0.01, "clip_norm": 1.0, "accumulate_steps": 1},
            "schedules": {"learning_rate": {"kind": "constant", "value": 3e-2}},
            "ema": {"decay": 0.9, "every": 1},
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            "batch_size": 16,
            "steps": 10,
            "cadence": {"log": 1, "eval": 5, "preview": 0, "checkpoint": 5},
            "eval_batches": 2,
            "keep": {"last": 2, "best": 1},
            "max_nonfinite": 3,
            "timeout_seconds": {"data": 600.0, "step": 600.0},
            "profile_steps": 0,
            "overlap_exchanges": False,
        }
    )
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return config


class TinyNet(nn.Module):
    """[B, FEATURES] → [B, TARGETS], with the dimension names of a transformer's MLP."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        named = functools.partial(nn.with_logical_partitioning, nn.initializers.lecun_uniform())
        x = nn.relu(nn.Dense(HIDDEN, kernel_init=named(("embed", "mlp")), name="up")(x))
        return nn.Dense(TARGETS, kernel_init=named(("mlp", "embed")), name="down")(constrain(x, "batch", "mlp"))


class TinyTask:
    """Mean squared error, with dropout-like noise so that keys matter."""

    title, studies = "tiny net", "numbers"

    def __init__(self, noise: float = 0.1, poison: tuple[int, ...] = (), best_metric: str = "error"):
        self.best_metric = best_metric
        self.schedules = {"noise": lambda step: noise / (1.0 + step)}
        self.frozen = {"offset": np.ones(TARGETS, np.float32)}
        self.net = TinyNet()
        self.poison = poison
        self.evaluations: list[dict[str, float]] = []

    def init(self, key):
        return self.net.init(key, jnp.zeros((1, FEATURES)))["params"]

    def loss(self, params, frozen, batch, key, step):
        x = batch["x"] + self.schedules["noise"](step) * jax.random.uniform(key, batch["x"].shape)
        error = self.net.apply({"params": params}, x) + frozen["offset"][None] - batch["y"]
        loss = jnp.mean(jnp.square(error))
        poisoned = functools.reduce(jnp.logical_or, [step == at for at in self.poison], jnp.zeros((), bool))
        return jnp.where(poisoned, jnp.nan, 1.0) * loss, {
            "mean_x": jnp.mean(batch["x"]),
            "drawn": jax.random.uniform(key),
        }

    def evaluate(self, params, frozen, batches, key):
        errors = [self._error(params, frozen, batch["x"], batch["y"]) for batch in batches]
        self.evaluations.append({"error": float(np.mean(errors)), "batches": len(errors)})
        return self.evaluations[-1]

    @functools.partial(jax.jit, static_argnums=0)
    def _error(self, params, frozen, x, y):
        return jnp.mean(jnp.square(self.net.apply({"params": params}, x) + frozen["offset"][None] - y))

    def preview(self, params, frozen, batch, key):
        return np.zeros((4, 6, 3), np.uint8)

    def in_words(self, metrics, examples):
        return [f"error of {metrics['error']:.3g}"]

    def next_steps(self, config, workdir, batch, flags):
        return [" ".join(["use", workdir, *flags])]


def _example(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    x = rng.standard_normal(FEATURES).astype(np.float32)
    return {"x": x, "y": np.tanh(x[:TARGETS] * x[TARGETS:]), "index": np.int32(index)}


def tiny_batches(batch_size: int, seed: int = 0, rows: Sequence[int] | None = None) -> Any:
    """Returns a grain iterator over endless shuffled batches of 97 examples, whose noise changes every epoch."""
    dataset = grain.MapDataset.range(97).seed(seed).shuffle().repeat().random_map(_example).batch(batch_size)
    if rows is not None:
        dataset = dataset.map(lambda batch: {name: value[rows] for name, value in batch.items()})
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def tiny_job(config: ConfigDict, **task: Any) -> Job:
    """Returns a job of `TinyTask(**task)` with three evaluation batches."""

    def rows_here():
        return host_rows(make_mesh(**config.mesh), config.batch_size)

    def eval_batches():
        rngs, here = [np.random.default_rng(i) for i in range(3)], rows_here()
        for rng in rngs:
            rows = [_example(i, rng) for i in range(config.batch_size)]
            yield {**{k: np.stack([r[k] for r in rows])[here] for k in rows[0]}, "valid": np.ones(len(here), bool)}

    return Job(
        task=TinyTask(**task),
        train_batches=lambda: tiny_batches(config.batch_size, config.seed, rows_here()),
        eval_batches=eval_batches,
        data_counts=lambda: {"left_out/unreadable": 2},
    )
