"""Facts of the machine: card, versions, bandwidth of copies, peak of bfloat16 products."""

from __future__ import annotations

import os
import subprocess
from importlib.metadata import PackageNotFoundError, version

import jax
import jax.numpy as jnp
from recorder import Recorder, seconds


def run(record: Recorder) -> None:
    device = jax.devices()[0]
    record("device", kind=device.device_kind, platform=device.platform, count=jax.device_count())
    record("cpu", cores=len(os.sched_getaffinity(0)), model=_cpu())
    record("versions", **{name: _version(name) for name in ("jax", "jaxlib", "flax", "optax", "torch")})
    record("driver", text=_driver())
    record.run([("copy", 2, lambda: _copy(record.tiny)), ("bfloat16 product", 2, lambda: _product(record.tiny))])


def _copy(tiny: bool) -> dict:
    """Reads and writes an array that is larger than the caches."""
    elements = 2**20 if tiny else 2**30
    array = jnp.zeros(elements, jnp.bfloat16)
    program = jax.jit(lambda x: x + 1)
    return {"gb_per_s": 2 * array.nbytes / seconds(lambda: program(array), 0.5) / 1e9, "bytes": array.nbytes}


def _product(tiny: bool) -> dict:
    side = 256 if tiny else 8192
    a = jnp.ones((side, side), jnp.bfloat16)
    program = jax.jit(lambda x, y: x @ y)
    return {"tflops": 2 * side**3 / seconds(lambda: program(a, a), 0.5) / 1e12, "side": side}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), None)
    except OSError:
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit,clocks.max.sm", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None
